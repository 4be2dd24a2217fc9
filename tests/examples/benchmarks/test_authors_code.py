"""The authors' CurvaDion of the comparison, by hand and on two replicas."""

from dataclasses import replace
from math import inf, sqrt
from types import SimpleNamespace

import pytest
import torch
from models import Net, parameters_of, train_step
from replicas import counted_collectives
from torch import nn

from examples.benchmarks.authors_code import AuthorsCurvaDion
from examples.benchmarks.compare_plan import BASE
from examples.benchmarks.compare_replica import Meter
from lightning_curvadion import CurvaDion, split_parameters

DION = {"lr": 0.02, "rank_fraction": 0.5}
STEPS = 5


def build(kind=AuthorsCurvaDion, **options):
    torch.manual_seed(0)
    model = Net()
    return model, kind(split_parameters(model), **DION, **options)


def train(rank, world, tau):
    model, optimizer = build(tau=tau, max_local_steps=None)
    optimizer.min_norm = 0.0
    reports = []
    with counted_collectives() as calls:
        for step in range(STEPS):
            train_step(model, optimizer, step, shard=rank)
            reports.append(optimizer.last_step)
    return parameters_of(model), reports, list(calls)


def test_replicas_that_never_synchronise_send_the_agreement_alone(replicas):
    (first, reports, calls), (second, others, _) = replicas.run(2, train, inf)
    assert calls == [("all_reduce", 4)] * STEPS
    assert reports == others and [(report.synced, report.bytes_sent) for report in reports] == [(False, 4)] * STEPS
    assert max((a - b).abs().max() for a, b in zip(first, second, strict=True)) > 1e-3


def test_replicas_that_always_synchronise_step_as_one_with_the_mean_gradient(replicas):
    (first, reports, calls), (second, others, _) = replicas.run(2, train, 0.0)
    model, optimizer = build(CurvaDion)
    for step in range(STEPS):
        gradients = []
        for shard in range(2):
            train_step(model, SimpleNamespace(zero_grad=model.zero_grad, step=lambda: None), step, shard)
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        for parameter, *own in zip(model.parameters(), *gradients, strict=True):
            parameter.grad = sum(own) / 2
        optimizer.step()
    for expected, a, b in zip(parameters_of(model), first, second, strict=True):
        torch.testing.assert_close(a, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(b, expected, rtol=0, atol=1e-6)
    size = 4 * sum(parameter.numel() for parameter in first)
    assert calls == [("all_reduce", 4), ("all_reduce", size)] * STEPS
    assert reports == others and reports[0].rmmc == inf
    assert {(report.synced, report.bytes_sent) for report in reports} == {(True, 4 + size)}


def test_rmmc_compares_with_the_momentum_after_the_last_step():
    matrix, vector = nn.Parameter(torch.eye(2)), nn.Parameter(torch.ones(2))
    groups = [{"params": [matrix]}, {"params": [vector], "algorithm": "adamw"}]
    optimizer = AuthorsCurvaDion(groups, mu=0.75, tau=0.1, rank_fraction=1.0, betas=(0.75, 0.95))
    matrix.grad, vector.grad = torch.diag(torch.tensor([3.0, 4.0])), torch.tensor([0.0, 4.0])
    assert optimizer.local_rmmc() == 0
    optimizer.step()
    assert not optimizer.last_step.synced
    # At full rank error feedback leaves mu B, of norm 3.75; of the first moment a quarter of the gradient, of norm 1.
    matrix.grad, vector.grad = torch.diag(torch.tensor([3.0, 4.0])), torch.tensor([0.5, 0.0])
    assert optimizer.local_rmmc().item() == pytest.approx(5 / 3.75)
    matrix.grad.zero_()
    assert optimizer.local_rmmc().item() == pytest.approx(sqrt(1.25) - 1)
    # A momentum of norm 1 is small beside two, and does not count.
    optimizer.min_norm = 2.0
    assert optimizer.local_rmmc() == 0


def test_sync_steps_and_bytes_of_an_optimizer_that_communicates_itself_count():
    run = replace(BASE, method="authors' code, tau=0.1")
    counts = []
    for kind in (AuthorsCurvaDion, CurvaDion):
        model, optimizer = build(kind, tau=0.0)
        meter = Meter(run, 1, [])
        train_step(model, optimizer, 0, shard=0)
        optimizer.last_step = replace(optimizer.last_step, synced=True, bytes_sent=7)
        meter.on_train_batch_end(SimpleNamespace(optimizers=[optimizer], global_step=1), model, None, None, 0)
        counts.append((meter.sync_steps, meter.payload))
    assert counts == [(1, 7), (0, 0)]
