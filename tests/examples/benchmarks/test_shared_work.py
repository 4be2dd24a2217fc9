"""``examples/benchmarks/shared_work.py --smoke``."""

import re
import sys

from examples.benchmarks import shared_work


def test_the_smoke_run_prints_a_row(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["shared_work.py", "--smoke"])
    shared_work.main()
    (row,) = re.findall(r"^\| 98,304 \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", capfd.readouterr().out, re.MULTILINE)
    alone, shared, ratio = map(float, row)
    assert alone > 0 and abs(shared / alone - ratio) < 0.1
