"""The switch from DDP: ``examples/switch_before.py`` and ``examples/switch_after.py``."""

import difflib
import os
import re
import runpy

import pytest
from launching import ROOT

BEFORE, AFTER = ROOT / "examples/switch_before.py", ROOT / "examples/switch_after.py"


def test_the_switch_is_three_lines():
    before, after = (path.read_text().splitlines() for path in (BEFORE, AFTER))
    changes = [line for line in difflib.ndiff(before, after) if line[0] in "+-" and line[2:].strip()]
    assert "lightning_curvadion" not in "\n".join(before)
    assert len([line for line in changes if line[0] == "+"]) == 3, changes
    assert len([line for line in changes if line[0] == "-"]) == 2, "the import is new, two lines are replaced"


@pytest.mark.parametrize(("example", "strategy"), [(BEFORE, "ddp"), (AFTER, "curvadion")])
def test_the_script_learns(tmp_path, monkeypatch, capfd, example, strategy):
    # Forked replicas need not import torch, which takes longer than the script. Nothing else is replaced.
    text = example.read_text()
    assert text.count(f'strategy="{strategy}"') == 1
    (tmp_path / "script.py").write_text(text.replace(f'"{strategy}"', f'"{strategy}_fork"'))
    monkeypatch.chdir(tmp_path)
    # Lightning leaves variables for its children behind.
    monkeypatch.setattr(os, "environ", os.environ.copy())
    runpy.run_path("script.py", run_name="__main__")
    (accuracy,) = re.findall(r"accuracy on data it has not seen: (\S+)", capfd.readouterr().out)
    assert float(accuracy) > 0.6, "a tenth would be chance"
