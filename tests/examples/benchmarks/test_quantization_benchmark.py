"""``examples/benchmarks/quantization.py --smoke``."""

import re

from ahead import ahead
from training import smoke_run


@ahead
def quantization_smoke(folder):
    return smoke_run("quantization.py", folder)


def test_the_smoke_run_prints_every_table(quantization_smoke):
    for line in ("| int2 |", "between two replicas", "A sync step, milliseconds", "Relative error", "gated 3, seed 0"):
        assert line in quantization_smoke
    row = r"^\| [24] \| .* \| (int8|sign) \| [\d.]+ \| ([\d.]+) \| .* \| ([\d.]+) \|$"
    steps = re.findall(row, quantization_smoke, re.MULTILINE)
    assert {name for name, *_ in steps} == {"int8", "sign"}
    assert all(float(quantizing) > 0 and float(sending) > 0 for _, quantizing, sending in steps), steps
