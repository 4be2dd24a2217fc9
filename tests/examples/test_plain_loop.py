"""``examples/plain_loop.py``: no Lightning."""

import re

import pytest
from launching import ROOT, free_port, run_as_torchrun


def test_the_plain_loop_trains_and_synchronises(replicas):
    printed, other = replicas.run(2, run_as_torchrun, ROOT / "examples/plain_loop.py", free_port())
    first, last, synced, steps = re.search(r"loss (\S+) -> (\S+), (\d+) sync steps of (\d+)", printed).groups()
    assert float(last) < 0.6 * float(first) and 1 < int(synced) < int(steps)
    sent, in_steps, ddp = map(
        float, re.search(r"(\S+) MB sent, (\S+) of them in steps; DDP would have sent (\S+) MB", printed).groups()
    )
    numbers = 128 * (32 + 1) + 128 * (128 + 1) + 10 * (128 + 1)
    assert ddp == pytest.approx(4 * numbers * int(steps) / 1e6, rel=0.01)
    assert in_steps < 0.015 * ddp, "a share as the strategy's"
    # The consensus at the end: parameters and the optimizer's state, once at full width.
    assert sent - in_steps == pytest.approx(3 * 4 * numbers / 1e6, rel=0.3)
    assert other == "", "rank 0 alone prints"
