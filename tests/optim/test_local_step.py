"""The local step of matrices on one replica."""

import pytest
import torch
from models import build, matrix, train_step, with_gradients
from torch import nn

from lightning_curvadion import CurvaDion, EveryNSteps, split_parameters


def test_a_missing_gradient_counts_as_zero():
    torch.manual_seed(0)
    first, second = matrix(), matrix()
    second.data.copy_(first.data)
    optimizers = [CurvaDion([first]), CurvaDion([second])]
    for step in range(5):
        with_gradients(first, second, seed=step)
        second.grad.copy_(first.grad)
        if step in (1, 3):
            first.grad, second.grad = None, torch.zeros_like(second)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(first, second)


def test_the_sgd_local_update_is_the_papers_cheap_step():
    parameter = matrix()
    optimizer = CurvaDion(
        [parameter], local_update="sgd", local_lr=0.1, mu=0.9, rank_fraction=0.25, trigger=EveryNSteps(3)
    )
    momentum = torch.zeros(6, 4)
    for step in range(2):
        before = parameter.detach().clone()
        with_gradients(parameter, seed=step)
        optimizer.step()
        momentum = 0.9 * (momentum + parameter.grad)
        torch.testing.assert_close(parameter.detach(), before - 0.1 * parameter.grad)
        torch.testing.assert_close(optimizer.state[parameter]["momentum"], momentum)
    before = parameter.detach().clone()
    with_gradients(parameter, seed=2)
    optimizer.step()
    assert optimizer.last_step.synced
    update = torch.linalg.svdvals(parameter.detach() - before * (1 - 0.01 * 0.01))
    assert update[0] == pytest.approx(0.01 * (6 / 4) ** 0.5, rel=0.05), (
        "a sync step is a Dion step: an orthonormal update"
    )


def test_frozen_parameters_do_not_move_and_train_once_unfrozen():
    model, optimizer = build(weight_decay=0.1)
    frozen = model.up[0].weight, model.norm.weight
    for p in frozen:
        p.requires_grad_(False)
    before = [p.detach().clone() for p in frozen]
    for step in range(3):
        train_step(model, optimizer, step, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, frozen, strict=True))
    for p in frozen:
        p.requires_grad_(True)
    train_step(model, optimizer, 3, 0)
    assert not any(torch.equal(a, b) for a, b in zip(before, frozen, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_train(dtype):
    model, _ = build()
    model.to(dtype)
    optimizer = CurvaDion(split_parameters(model), lr=0.02)
    losses = []
    for step in range(30):
        tokens = torch.randint(0, 11, (64,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens), (3 * tokens + 1) % 11)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.dtype == dtype for p in model.parameters())
