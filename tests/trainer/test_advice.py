"""Each warning of ``CommunicationMonitor`` comes where it applies, and nowhere else."""

import csv
from statistics import mean

import pytest
import torch
from torch import nn
from training import ROOT

from examples.benchmarks import models
from examples.benchmarks.methods import DEFAULT
from examples.benchmarks.model_replica import OURS, TASKS, finished
from lightning_curvadion.trainer.advice import MEASURED_SYNC_RATES, RunSoFar, advice_on_model, advice_on_run

HEALTHY = {"steps": 400, "sync_steps": 80, "step_bytes": 8000, "consensus_bytes": 1000, "drifts": [0.03] * 80}


@pytest.mark.parametrize(
    ("changes", "warnings"),
    [
        ({}, []),
        ({"sync_steps": 390}, ["often"]),
        ({"sync_steps": 1, "drifts": []}, ["never"]),
        ({"consensus_bytes": 9000}, ["consensus"]),
        ({"drifts": [0.02 + 0.01 * n for n in range(40)]}, ["drift"]),
        ({"steps": 50, "sync_steps": 50}, []),
    ],
    ids=["healthy", "often", "never", "consensus", "drift", "too early"],
)
def test_a_run_is_warned_of_what_defeats_its_purpose(changes, warnings):
    assert [key for key, _ in advice_on_run(RunSoFar(**{**HEALTHY, **changes}))] == warnings


def rows(name):
    with (ROOT / "examples/benchmarks/results" / name).open() as file:
        return list(csv.DictReader(file))


def test_the_measured_sync_rates_are_the_extremes_of_the_benchmarks():
    # A run that was stopped early for its timing has no rate.
    compared = [row for row in rows("compare.csv") if row["method"] == DEFAULT and row["stop"] == "0"]
    rates = {int(row["sync_steps"]) / int(row["steps"]): f"{row['replicas']} replicas" for row in compared}
    rates |= {float(row["sync_rate"]): row["model"] for row in rows("models.csv") if row["method"] == "ours"}
    low, high = min(rates), max(rates)
    print(f"sync rates of the defaults: {low:.1%} ({rates[low]}) to {high:.1%} ({rates[high]})")
    assert (round(low, 2), round(high, 2)) == MEASURED_SYNC_RATES


def ranks(values):
    return torch.tensor(values).argsort().argsort().float()


def test_models_that_synchronise_more_do_not_lose_more():
    done = finished(models.RESULTS)
    settings = [(model, replicas) for model in TASKS for replicas in (2, 4)]
    rates = [mean(row.sync_rate for row in models.finished_seeds(model, OURS, n, done)) for model, n in settings]
    losses = [models.above(model, OURS, n, done) for model, n in settings]
    correlation = float(torch.corrcoef(torch.stack([ranks(rates), ranks(losses)]))[0, 1])
    print(f"rank correlation of sync rate and loss above DDP + Muon: {correlation:.1f} over {len(settings)} settings")
    assert correlation < 0


def test_a_large_embedding_is_named_unless_it_is_frozen():
    model = nn.ModuleDict({"words": nn.Embedding(1000, 8), "rest": nn.Linear(8, 8)})
    ((_, sentence),) = advice_on_model(model)
    assert "'words' holds 99 %" in sentence
    model["words"].weight.requires_grad_(False)
    assert list(advice_on_model(model)) == []
