"""``examples/benchmarks/quantization.py --smoke``."""

from launching import ROOT
from training import run_script


def test_the_smoke_run_prints_every_table(tmp_path):
    process = run_script(ROOT / "examples/benchmarks/quantization.py", "--smoke", folder=tmp_path)
    assert process.returncode == 0, process.stderr[-4000:]
    for line in ("| int2 |", "between two replicas", "A sync step, seconds", "Relative error", "gated 3, seed 0"):
        assert line in process.stdout
