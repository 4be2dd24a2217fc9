"""``examples/benchmarks/quantization.py --smoke``."""

import sys

from ahead import ahead
from launching import ROOT, outputs, start
from training import python_path


@ahead
def quantization_smoke(folder):
    script = ROOT / "examples/benchmarks/quantization.py"
    (printed,) = outputs(start(sys.executable, script, "--smoke", cwd=folder, PYTHONPATH=python_path(ROOT)))
    return printed


def test_the_smoke_run_prints_every_table(quantization_smoke):
    for line in ("| int2 |", "between two replicas", "A sync step, seconds", "Relative error", "gated 3, seed 0"):
        assert line in quantization_smoke
