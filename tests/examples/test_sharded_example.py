"""``examples/sharded.py``: a process of a sharded replica holds a half of it, and trains the same model."""

import logging
import re
import sys
from unittest import mock

from launching import ROOT, free_port, run_as_torchrun


def train(rank, world, port):
    logger = logging.getLogger("lightning.pytorch")
    words = ["sharded.py", "--steps", "6", "--layers", "2", "--width", "64"]
    # A worker serves other tests after this one.
    with mock.patch.object(sys, "argv", words), mock.patch.object(logger, "setLevel"):
        return run_as_torchrun(rank, world, ROOT / "examples/sharded.py", port)


def test_a_process_holds_a_half_and_trains_the_same_model(replicas):
    printed, *others = replicas.run(4, train, free_port(), timeout=240)
    assert not any("MB in each process" in other for other in others)
    rows = re.findall(r"^  (\w[\w ]+?) +(\d+\.\d+) +(\d+\.\d+)$", printed, re.MULTILINE)
    assert [name for name, *_ in rows] == ["parameters", "state", "last consensus"]
    for _, whole, sharded in rows:
        assert abs(float(sharded) - float(whole) / 2) <= 0.01
    assert float(re.search(r"farthest weight: (\S+)", printed).group(1)) < 1e-5
