"""The metrics of ``lightning_curvadion.trainer.metrics``, with Lightning and without."""

import math

import pytest
import torch
from models import build, train_step
from torch import nn

from lightning_curvadion import CurvaDion, EveryNSteps, split_parameters
from lightning_curvadion.trainer import metrics
from lightning_curvadion.trainer.rmmc_metric import RMMC


def loop_with_metrics(rank, world):
    """Bytes of this rank, and the metrics over all ranks, of a loop without Lightning."""
    model, optimizer = build(hook={}, trigger=EveryNSteps(3))
    rate, since, sent, drift = metrics.SyncRate(), metrics.StepsSinceSync(), metrics.BytesSent(), metrics.Drift()
    optimizer.sync_hook.measure_drift()
    total = 0
    for step in range(8):
        train_step(model, optimizer, step, rank)
        rate.update(optimizer.last_step.synced)
        since.update(optimizer.last_step.synced)
        sent.update(optimizer.last_step.bytes_sent)
        drift.update(optimizer.sync_hook.drift)
        total += optimizer.last_step.bytes_sent
    return total, [metric.compute().item() for metric in (rate, since, sent, drift)]


def test_torchmetrics_reduces_them_over_the_ranks(replicas):
    (bytes_0, values_0), (bytes_1, values_1) = replicas.run(2, loop_with_metrics)
    assert values_0 == values_1 and values_0[:3] == [0.25, 2, bytes_0 + bytes_1] and values_0[3] > 0


def test_bytes_are_exact_beyond_float32():
    sent, saved = metrics.BytesSent(), metrics.BytesSaved()
    for _ in range(2):
        sent.update(2**40 + 1)
        saved.update(1, ddp=2**40)
    assert sent.compute().item() == 2**41 + 2 and saved.compute().item() == 2**41 - 2


def test_rmmc_leaves_out_the_infinite_first_step():
    rmmc = RMMC(["a"])
    rmmc.update(math.inf, {"a": math.inf})
    rmmc.update(0.5, {"a": 0.25, "unknown": 9.0})
    assert {name: value.item() for name, value in rmmc.compute().items()} == {"max": 0.5, "a": 0.25}


def test_rmmc_by_parameter_is_the_relative_change_of_each_momentum_norm():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    optimizer = CurvaDion(split_parameters(model))
    assert optimizer.rmmc_by_parameter() == {}
    norms = []
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(4, 6, generator=generator)).square().mean().backward()
        momenta = [optimizer.state[p].get("momentum", torch.zeros_like(p)) for p in (model[0].weight, model[1].weight)]
        pairs = zip(momenta, (model[0].weight, model[1].weight), strict=True)
        norms.append([(m + p.grad).norm().item() for m, p in pairs])
        optimizer.step()
    changes = [abs(now - before) / before for before, now in zip(*norms, strict=True)]
    by_parameter = optimizer.rmmc_by_parameter()
    assert list(by_parameter) == ["0.weight", "1.weight", "first moments"]
    *matrices, others = by_parameter.values()
    assert matrices == pytest.approx(changes, rel=1e-4)
    assert others > 0
    assert optimizer.last_step.rmmc == pytest.approx(max(by_parameter.values()))
