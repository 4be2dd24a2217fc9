"""``examples/benchmarks/heterogeneous.py --smoke``."""

import re
import sys

from training import ROOT

from examples.benchmarks import heterogeneous


def test_the_smoke_run_prints_a_row_for_each_way(monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["heterogeneous.py", "--smoke"])
    heterogeneous.main()
    printed = capfd.readouterr().out
    rows = re.findall(r"^\| (.*?) \| (\d+) \+ (\d+) \| [\d.]+ \| ([\d.]+) \| \d+ % \| [\d.]+ ± ", printed, re.MULTILINE)
    assert [way for way, *_ in rows] == list(heterogeneous.WAYS)
    (_, fast, slow, ratio), *others = rows
    assert (fast, slow, ratio) == ("12", "12", "1.00")
    assert all(int(fast) > int(slow) for _, fast, slow, _ in others)
    assert "2 replicas, steps of 40 ms and 80 ms" in printed
