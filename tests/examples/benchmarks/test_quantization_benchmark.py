"""``examples/benchmarks/quantization.py --smoke``, as a user runs it."""

import sys

from launching import outputs, start


def test_the_smoke_run_prints_every_table():
    (printed,) = outputs(start(sys.executable, "examples/benchmarks/quantization.py", "--smoke"))
    for line in ("| int2 |", "between two replicas", "A sync step, seconds", "Relative error", "gated 3, seed 0"):
        assert line in printed
