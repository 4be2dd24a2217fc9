"""``examples/benchmarks/step_time.py --smoke``."""

import sys

from examples.benchmarks import step_time


def test_the_smoke_run_prints_every_optimizer(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["step_time.py", "--smoke"])
    step_time.main()
    printed = capsys.readouterr().out
    for dtype in ("torch.float32", "torch.bfloat16"):
        assert f"0.1 M parameters in {dtype}, one thread of" in printed
    ranks = [f"local step, Dion, rank fraction {fraction}" for fraction in step_time.RANK_FRACTIONS]
    for line in ("AdamW", "local step, Muon", *ranks, "RMMC of all", "Muon"):
        assert printed.count(f"\n{line}") == 2
