"""``examples/benchmarks/latency.py --smoke``."""

import sys

import pytest

from examples.benchmarks import latency
from examples.benchmarks.netlab import missing


@pytest.mark.alone
@pytest.mark.skipif(bool(missing()), reason=f"missing for a network lab: {missing()}")
def test_the_smoke_run_prints_what_a_latency_of_ten_milliseconds_costs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["latency.py", "--smoke"])
    assert latency.main() == 0
    link, *collectives = (line.split() for line in capsys.readouterr().out.splitlines() if "10ms" in line)
    assert link[:2] == ["50mbit", "10ms"] and 20 <= float(link[2]) < 24
    # There and back, and half that again until the replicas are in step.
    assert [cells[:3] for cells in collectives] == [["2", "10ms", way] for way in latency.WAYS]
    assert all(19 <= float(cells[3]) < 40 for cells in collectives)
