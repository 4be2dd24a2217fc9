"""``examples/benchmarks/step_time.py --smoke``."""

import sys

from examples.benchmarks import step_time


def test_the_smoke_run_prints_every_optimizer(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["step_time.py", "--smoke"])
    step_time.main()
    printed = capsys.readouterr().out
    for line in ("AdamW", "CurvaDion, local step", "CurvaDion, sync step", "Muon", "RMMC takes", "state of CurvaDion"):
        assert line in printed
