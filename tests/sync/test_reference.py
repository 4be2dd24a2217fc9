"""Real replicas with different data beside the plain simulation, in every combination that a user can choose."""

import pytest
import torch
from models import exact_sync
from reference import Matrix
from torch import nn

from lightning_curvadion import CurvaDion, EveryNSteps

SHAPES = [(12, 8), (8, 12), (8, 8), (12, 8), (5, 1)]
STEPS = 7


def start():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in SHAPES]


def gradients(rank, step):
    generator = torch.Generator().manual_seed(100 * rank + step)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in SHAPES]


def learning_rate(step):
    return 0.05 * (1 + step % 4)


def ours(rank, world, period, momentum, consensus, rank_fraction):
    parameters = [nn.Parameter(tensor) for tensor in start()]
    optimizer = CurvaDion(
        parameters, lr=0.1, mu=0.9, weight_decay=0.1, rank_fraction=rank_fraction, trigger=EveryNSteps(period)
    )
    optimizer.register_sync_hook(exact_sync(momentum=momentum, consensus=consensus))
    history = []
    for step in range(STEPS):
        for parameter, gradient in zip(parameters, gradients(rank, step), strict=True):
            parameter.grad = gradient
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        optimizer.step()
        states = [optimizer.state[p] for p in parameters]
        history.append(
            [
                [p.detach().clone(), s["momentum"].clone(), s["Q"].clone()]
                for p, s in zip(parameters, states, strict=True)
            ]
        )
    return history


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize("rank_fraction", [0.25, 1.0])
@pytest.mark.parametrize(
    ("momentum", "consensus"),
    [
        *[
            (momentum, consensus)
            for consensus in ("average", "factors")
            for momentum in ("factors", "dion", "average", "local")
        ],
        ("displacement", "average"),
        ("dion", "none"),
    ],
)
def test_every_combination_follows_the_plain_version(replicas, world, period, rank_fraction, momentum, consensus):
    histories = replicas.run(world, ours, period, momentum, consensus, rank_fraction)
    matrices = [Matrix(tensor, world, rank_fraction, seed) for seed, tensor in enumerate(start())]
    for step in range(STEPS):
        for j, matrix in enumerate(matrices):
            matrix.step(
                [gradients(rank, step)[j] for rank in range(world)],
                sync=step % period == period - 1, momentum=momentum, consensus=consensus, lr=learning_rate(step),
                mu=0.9, wd=0.1,
            )  # fmt: skip
            for rank in range(world):
                torch.testing.assert_close(histories[rank][step][j], matrix.state(rank), rtol=1e-7, atol=1e-8)
