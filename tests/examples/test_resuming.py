"""``examples/resuming.py``: a run that loses a replica continues from its checkpoint."""

import logging
import os
import re
import runpy

import pytest
from launching import ROOT


@pytest.fixture
def restored_process(monkeypatch):
    """Undoes what the script leaves in this process: logging levels, and Lightning's variables for its children."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    levels = {name: logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric")}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.usefixtures("restored_process")
def test_a_killed_run_is_resumed_bit_for_bit(capfd):
    # Its replicas are forked in any case, so that a process of its own would only import torch once more.
    runpy.run_path(str(ROOT / "examples/resuming.py"), run_name="__main__")
    printed = capfd.readouterr().out
    assert "terminated with signal SIGKILL" in printed
    assert "bit for bit: True" in printed
    (whole, left, resumed, alone) = map(int, re.findall(r"(\d+) steps", printed))
    assert 0 < left < whole == resumed < alone, "one replica has twice the steps to an epoch"
