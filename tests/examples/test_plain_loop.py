"""``examples/plain_loop.py``: no Lightning."""

import re

from launching import ROOT, free_port, run_as_torchrun


def test_the_plain_loop_trains_and_synchronises(replicas):
    printed, other = replicas.run(2, run_as_torchrun, ROOT / "examples/plain_loop.py", free_port())
    first, last, synced, steps = re.search(r"loss (\S+) -> (\S+), (\d+) sync steps of (\d+)", printed).groups()
    assert float(last) < 0.6 * float(first) and 1 < int(synced) < int(steps)
    assert other == "", "rank 0 alone prints"
