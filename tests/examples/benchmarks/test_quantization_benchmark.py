"""``examples/benchmarks/quantization.py --smoke``."""

import preloaded
from launching import ROOT


def test_the_smoke_run_prints_every_table(tmp_path):
    output = tmp_path / "output"
    process = preloaded.start("examples/benchmarks/quantization.py", "--smoke", folder=ROOT, output=output)
    try:
        status = process.wait(120)
    finally:
        process.kill()
    printed = output.read_text()
    assert status == 0, printed[-4000:]
    for line in ("| int2 |", "between two replicas", "A sync step, seconds", "Relative error", "gated 3, seed 0"):
        assert line in printed
