"""Muon's step: that of ``torch.optim.Muon``, stable where rounding decides, and the default."""

import pytest
import torch
from models import matrix, with_gradients
from torch import nn

from lightning_curvadion import CurvaDion
from lightning_curvadion.optim import muon


@pytest.mark.parametrize("shape", [(48, 32), (32, 32)])
def test_steps_are_those_of_torch_muon(shape):
    # torch scales tall and square matrices as we do, and computes in bfloat16: 3 digits of a step.
    torch.manual_seed(0)
    ours = matrix(*shape)
    theirs = nn.Parameter(ours.detach().clone())
    start = ours.detach().clone()
    optimizers = (
        CurvaDion([ours], lr=0.02, mu=0.9, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=0.02, momentum=0.9, weight_decay=0.1),
    )
    for step in range(6):
        with_gradients(ours, seed=step)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved
    assert moved > 6 * 0.01


def test_singular_values_end_near_one():
    torch.manual_seed(0)
    U, _, V = torch.linalg.svd(torch.randn(3, 20, 12), full_matrices=False)
    values = torch.logspace(0, -2.5, 12)
    for matrices in (U @ torch.diag(values) @ V, (U @ torch.diag(values) @ V).mT):
        for scale in (1e-4, 1.0, 1e18):
            singular = torch.linalg.svdvals(muon.newton_schulz(scale * matrices))
            assert singular.min() > 0.6 and singular.max() < 1.25


def test_directions_that_only_rounding_has_made_hardly_step():
    torch.manual_seed(0)
    low_rank = torch.randn(1, 40, 3) @ torch.randn(1, 3, 30)
    noise = 1e-7 * low_rank.abs().mean() * torch.randn(1, 40, 30)
    apart = muon.newton_schulz(low_rank + noise) - muon.newton_schulz(low_rank)
    assert apart.norm() < 1e-3 * 3**0.5


def test_a_matrix_without_gradients_stays_and_can_wake_up():
    parameter = nn.Parameter(torch.ones(4, 3))
    optimizer = CurvaDion([parameter], weight_decay=0.0)
    for _ in range(2):
        optimizer.step()
    assert torch.equal(parameter, torch.ones(4, 3))
    with_gradients(parameter)
    optimizer.step()
    assert not torch.equal(parameter, torch.ones(4, 3)) and parameter.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_step_as_float32_does(dtype):
    torch.manual_seed(0)
    U = torch.randn(2, 24, 16)
    expected, found = muon.newton_schulz(U), muon.newton_schulz(U.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.03)


def test_a_rank_means_dion_and_nothing_else_means_muon():
    def updates(options, *groups):
        return [group["local_update"] for group in CurvaDion(list(groups), **options).param_groups]

    def plain():
        return {"params": [matrix()]}

    assert updates({}, plain()) == ["muon"]
    assert updates({"rank_fraction": 0.5}, plain()) == ["dion"]
    assert updates({"rank_fraction": 0.5, "local_update": "muon"}, plain()) == ["muon"]
    assert updates({}, plain(), plain() | {"rank_fraction": 0.25}) == ["muon", "dion"]
    assert updates({"local_update": "dion"}, plain(), plain() | {"local_update": "muon"}) == ["dion", "muon"]
