"""The signal of a step: measured before anything is written, and read by the host once."""

import itertools

import pytest
import torch
from models import build, equal, matrix, state_of, with_gradients
from torch import nn

from lightning_curvadion import CurvaDion, ProcessGroupSync, split_parameters
from lightning_curvadion.optim.local_step import local_step
from lightning_curvadion.optim.step_signal import SignalMeter


def test_measuring_writes_nothing():
    model, optimizer = build()
    with_gradients(*model.parameters())
    optimizer.step()
    before = state_of(optimizer)
    with_gradients(*model.parameters(), seed=1)
    signal = SignalMeter().measure(optimizer, optimizer.matrix_stacks(), rank=0)
    assert signal.numbers[0] > 0 and signal.numbers[1] == 0
    assert equal(before, state_of(optimizer))


def test_the_code_of_a_bad_gradient_depends_on_the_rank():
    parameter = matrix()
    optimizer = CurvaDion([parameter])
    parameter.grad = torch.full_like(parameter, torch.nan)
    codes = [SignalMeter().measure(optimizer, optimizer.matrix_stacks(), rank).numbers[1].item() for rank in (0, 3)]
    assert 1 <= codes[0] < codes[1]


@pytest.mark.gpu
def test_one_host_synchronisation_a_step_on_a_gpu():
    parameters = [nn.Parameter(torch.randn(64, 32, device="cuda")) for _ in range(4)]
    optimizer, meter = CurvaDion(parameters), SignalMeter()
    for step in range(3):
        for p in parameters:
            p.grad = torch.randn_like(p)
        stacks = optimizer.matrix_stacks()
        if step == 2:
            torch.cuda.set_sync_debug_mode("error")
        try:
            signal = meter.measure(optimizer, stacks, rank=0)
            torch.cuda.set_sync_debug_mode("default")
            signal.numbers.tolist()
            if step == 2:
                torch.cuda.set_sync_debug_mode("error")
            local_step(optimizer, stacks)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def train_convolutions(rank, world, steps, algorithm):
    """Decisions of a net without a matrix group, with the default trigger and no cap."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3))
    groups = split_parameters(model, overrides={"*": algorithm})
    optimizer = CurvaDion(groups, lr=0.003, max_local_steps=None)
    optimizer.register_sync_hook(ProcessGroupSync(lag=0))
    generator = torch.Generator().manual_seed(1 + rank)
    reports = []
    for _ in range(steps):
        images = torch.randn(16, 1, 6, 6, generator=generator)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(images).mean((2, 3)), images.mean((1, 2, 3)).repeat(3, 1).T).backward()
        optimizer.step()
        reports.append(optimizer.last_step)
    return reports


@pytest.mark.parametrize("algorithm", ["adamw", "lion"])
def test_a_model_without_a_matrix_synchronises_when_its_first_moments_change(replicas, algorithm):
    reports, others = replicas.run(2, train_convolutions, 60, algorithm)
    assert reports == others
    assert reports[0].synced and reports[0].rmmc == float("inf")
    synced = [step for step, report in enumerate(reports) if report.synced]
    assert 6 < len(synced) < 40
    assert max(later - earlier for earlier, later in itertools.pairwise(synced)) < 20


def step_signals(parameters, groups, gradients):
    """RMMC of each step, for gradients of each parameter and step."""
    optimizer = CurvaDion(groups, max_local_steps=None)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = None if gradient is None else torch.full_like(parameter, gradient)
        optimizer.step()
        yield optimizer.last_step.rmmc


def test_all_vectors_count_as_one_momentum_beside_the_matrices():
    small, large, idle = (nn.Parameter(torch.zeros(n)) for n in (1, 99, 5))
    groups = [{"params": [small], "algorithm": "lion"}, {"params": [large, idle], "algorithm": "adamw"}]
    rmmc = list(step_signals([small, large, idle], groups, [(1.0, 1.0, None), (-1.0, None, None), (0.0, 0.0, None)]))
    # Lion: M = 0.05, then -0.0025. AdamW: M = 0.1, which a missing gradient leaves as it is.
    expected = [float("inf"), 1 - (99 * 0.1**2 + 0.0025**2) ** 0.5 / (99 * 0.1**2 + 0.05**2) ** 0.5]
    assert rmmc[:2] == pytest.approx(expected, rel=1e-4)
    assert rmmc[2] == pytest.approx(0.1, rel=1e-3)

    parameter = matrix()
    groups = [{"params": [parameter]}, {"params": [small], "algorithm": "adamw"}]
    rmmc = list(step_signals([parameter, small], groups, [(1.0, 1.0), (None, None), (None, 10.0)]))
    assert rmmc[1] < 0.1
    assert rmmc[2] == pytest.approx(9.9, rel=1e-4), "M = 0.1, then 1.09"


def test_frozen_vectors_do_not_count():
    frozen, trained = nn.Parameter(torch.zeros(50), requires_grad=False), nn.Parameter(torch.zeros(2))
    optimizer = CurvaDion([{"params": [frozen, trained], "algorithm": "adamw"}], max_local_steps=None)
    for gradient in (1.0, 2.0):
        trained.grad = torch.full_like(trained, gradient)
        optimizer.step()
    assert optimizer.last_step.rmmc == pytest.approx(1.9, rel=1e-4)
    assert optimizer.rmmc_by_parameter() == {"first moments": pytest.approx(1.9, rel=1e-4)}
