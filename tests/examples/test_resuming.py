"""``examples/resuming.py``: a run that loses a replica continues from its checkpoint."""

import re
import sys

from ahead import ahead
from launching import outputs, start


@ahead
def resuming(folder):
    # With as many threads as a user has: a forked replica must not wait for threads that only its parent has.
    (printed,) = outputs(start("env", "-u", "OMP_NUM_THREADS", sys.executable, "examples/resuming.py"))
    return printed


def test_a_killed_run_is_resumed_bit_for_bit(resuming):
    assert "terminated with signal SIGKILL" in resuming
    assert "bit for bit: True" in resuming
    (whole, left, resumed, alone) = map(int, re.findall(r"(\d+) steps", resuming))
    assert 0 < left < whole == resumed < alone, "one replica has twice the steps to an epoch"
