"""Tables and plans of ``examples/benchmarks/models.py``, and a smoke run of it."""

import sys
from dataclasses import asdict, replace
from functools import partial

import pytest
from torch.multiprocessing.spawn import start_processes

pytest.importorskip("sklearn")
pytest.importorskip("transformers")

from examples.benchmarks import models, replica_training
from examples.benchmarks.model_replica import ADAMW, CARRIED, MUON, OURS, PARTS, TASKS, Outcome, Run, finished
from examples.benchmarks.replica_training import append

OUTCOME = Outcome(loss=2.0, accuracy=0.5, train_loss=1.0, sync_rate=0.25, byte_share=0.01, seconds=3.0)
LSTM = TASKS["LSTM"]


def sweep_of(method, losses):
    runs = [Run("LSTM", method, 2, lr, 0, LSTM.length) for lr in models.rates("LSTM", method)]
    return {run: (replace(OUTCOME, loss=loss), "abc") for run, loss in zip(runs, losses, strict=True)}


def test_a_finished_run_is_not_repeated(tmp_path):
    runs = models.plan("sweep", ["LSTM"], {})
    for run in runs:
        append(tmp_path / "models.csv", {**asdict(run), **asdict(OUTCOME), "commit": "abc"})
    assert finished(tmp_path / "models.csv") == dict.fromkeys(runs, (OUTCOME, "abc"))
    models.train_missing(runs, tmp_path / "models.csv")
    assert len((tmp_path / "models.csv").read_text().splitlines()) == len(runs) + 1


def test_every_method_runs_its_seeds_at_the_best_rate_of_its_own_sweep():
    done = sweep_of(ADAMW, [1.9, 2.1, 2.2]) | sweep_of(MUON, [2.0, 1.7, 2.0]) | sweep_of(OURS, [2.0, 1.9, 1.8])
    best = {ADAMW: LSTM.adamw_rates[0], MUON: LSTM.muon_rates[1], OURS: LSTM.muon_rates[2]}
    for stage, replicas in (("seeds", 2), ("four", 4)):
        expected = {(method, replicas, lr, seed) for method, lr in best.items() for seed in LSTM.seeds}
        planned = models.plan(stage, ["LSTM"], done)
        assert {(run.method, run.replicas, run.lr, run.seed) for run in planned} == expected


def test_parts_are_run_where_ours_loses_more_than_two_percent():
    muon = sweep_of(MUON, [2.0, 2.1, 2.2])
    assert models.plan("parts", ["LSTM"], muon | sweep_of(OURS, [2.03, 2.1, 2.2])) == []
    losing = models.plan("parts", ["LSTM"], muon | sweep_of(OURS, [2.2, 2.05, 2.2]))
    assert {run.method for run in losing} == set(PARTS)
    assert {run.lr for run in losing} == {LSTM.muon_rates[1]}, "ours without a part trains at the rate of ours"
    assert {run.replicas for run in losing} == {2}
    losses = {MUON: 1.9, OURS: 2.0}
    four = {
        Run("LSTM", method, 4, LSTM.muon_rates[0], LSTM.seeds[0], LSTM.length): (replace(OUTCOME, loss=loss), "abc")
        for method, loss in losses.items()
    }
    losing = models.plan("parts", ["LSTM"], muon | sweep_of(OURS, [2.03, 2.1, 2.2]) | four)
    assert {(run.method, run.replicas) for run in losing} == {(part, 4) for part in PARTS}


def test_adamws_rate_is_carried_over_from_its_own_sweep():
    done = sweep_of(ADAMW, [2.2, 2.1, 1.9]) | sweep_of(OURS, [2.0, 1.9, 1.8])
    planned = models.plan("carried", ["LSTM"], done)
    assert {(run.method, run.lr) for run in planned} == {(CARRIED, LSTM.adamw_rates[2])}


def test_the_difference_is_over_the_seeds_that_both_have():
    done = sweep_of(MUON, [2.0, 2.1, 2.2]) | sweep_of(OURS, [2.1, 2.2, 2.3])
    done[Run("LSTM", OURS, 2, LSTM.muon_rates[0], 1, LSTM.length)] = (replace(OUTCOME, loss=9.0), "abc")
    assert models.above("LSTM", OURS, 2, done) == pytest.approx(5.0)
    assert models.above("LSTM", OURS, 4, done) is None


def test_the_smoke_run_trains_every_model_on_two_replicas_and_prints_the_table(monkeypatch, capsys):
    """Its replicas are forks of this process, which has imported transformers and scikit-learn; the rest runs here."""
    monkeypatch.setattr(replica_training, "spawn", partial(start_processes, start_method="fork"))
    monkeypatch.chdir(models.ROOT)
    monkeypatch.setattr(sys, "argv", ["models.py", "--smoke"])
    for task in models.ALL_TASKS.values():
        monkeypatch.setattr(task, "length", task.length)
    assert models.main() == 0
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")] for line in printed.splitlines() if line.startswith("| ")]
    table = {row[1]: row for row in rows if row[2] == "2"}
    assert set(table) == set(TASKS)
    for model, row in table.items():
        losses = [float(cell.partition(",")[0]) for cell in row[3:6]]
        assert len(set(losses)) > 1 and all(0 < loss < 10 for loss in losses), f"{model}: {losses}"
        assert 0 < float(row[8].removesuffix(" %")) < 40, f"{model}: the share of DDP's bytes is that of one bit"
    assert {row[1] for row in rows if row[2] == "LSTM"} >= set(PARTS)
    (carried,) = [row for row in rows if row[1] == "LSTM" and len(row) == 7]
    assert float(carried[2]) == LSTM.adamw_rates[1] and 0 < float(carried[4].partition(",")[0]) < 10
