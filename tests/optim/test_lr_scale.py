"""The scale of a matrix's step: by its spectral norm, or by the root mean square of AdamW's steps."""

import pytest
import torch
from models import matrix, with_gradients
from torch import nn

from lightning_curvadion import CurvaDion
from lightning_curvadion.optim.momentum_correction import Correction, correct_momenta_

DION = {"local_update": "dion", "rank_fraction": 0.25}


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (32, 32)])
def test_steps_that_match_adamw_are_those_of_torch_muon(shape):
    # torch computes in bfloat16: 3 digits of a step.
    torch.manual_seed(0)
    ours = matrix(*shape)
    theirs, start = nn.Parameter(ours.detach().clone()), ours.detach().clone()
    optimizers = (
        CurvaDion([ours], lr=0.02, mu=0.9, weight_decay=0.1, lr_scale="match_rms_adamw"),
        torch.optim.Muon([theirs], lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for step in range(4):
        with_gradients(ours, seed=step)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert (ours - theirs).norm() < 0.02 * (theirs - start).norm()


def size_of_a_step(parameter, **options):
    """Root mean square of a step over its learning rate, once the right factors have found the gradient's."""
    group = {"params": [parameter], "lr_scale": "match_rms_adamw", "weight_decay": 0.0, **options}
    optimizer = CurvaDion([group], lr=0.01)
    for _ in range(3):
        before = parameter.detach().clone()
        with_gradients(parameter)
        optimizer.step()
    return ((parameter.detach() - before).square().mean().sqrt() / 0.01).item()


@pytest.mark.parametrize("options", [{}, DION], ids=["muon", "dion"])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((64, 64), {}),
        ((128, 16), {}),
        ((16, 128), {}),
        ((16, 128), {"transposed": True}),
        ((4, 32, 64), {}),
        ((32, 8, 3, 3), {"flatten": True}),
        ((32, 4, 5), {"flatten": True, "transposed": True}),
    ],
)
def test_a_step_has_the_size_of_adamws_whatever_the_shape_and_the_rank(shape, layout, options):
    torch.manual_seed(0)
    # Dion's singular values are one; Newton-Schulz leaves Muon's between 0.7 and 1.2.
    assert size_of_a_step(matrix(*shape), **layout, **options) == pytest.approx(0.2, rel=0.02 if options else 0.2)


def test_adamws_own_steps_have_that_size():
    torch.manual_seed(0)
    vector = nn.Parameter(torch.zeros(4096))
    optimizer = CurvaDion([{"params": [vector], "algorithm": "adamw", "weight_decay": 0.0}], lr=0.01)
    for step in range(200):
        before = vector.detach().clone()
        with_gradients(vector, seed=step)
        optimizer.step()
    assert ((vector.detach() - before).square().mean().sqrt() / 0.01).item() == pytest.approx(0.2, rel=0.3)


def test_groups_may_have_different_scales():
    torch.manual_seed(0)
    groups = [{"params": [matrix(16, 16)], "lr_scale": scale} for scale in ("spectral", "match_rms_adamw")]
    groups[1]["params"] = [nn.Parameter(groups[0]["params"][0].detach().clone())]
    optimizer = CurvaDion(groups, lr=0.1, weight_decay=0.0)
    (spectral,), (matched,) = (group["params"] for group in optimizer.param_groups)
    start = spectral.detach().clone()
    with_gradients(spectral)
    with_gradients(matched)
    optimizer.step()
    torch.testing.assert_close(matched - start, 0.2 * 16**0.5 * (spectral - start))


@pytest.mark.parametrize("update", [{"local_update": "muon"}, DION], ids=["muon", "dion"])
def test_the_correction_knows_how_long_the_steps_are(update):
    # The same difference of steps O, scaled as each option scales it, changes the momentum by the same.
    torch.manual_seed(0)
    momentum, steps, rank = torch.randn(24, 8), torch.randn(24, 8), 2 if update == DION else 8
    ends = []
    for lr_scale, scale in (("spectral", 3**0.5), ("match_rms_adamw", 0.2 * (24 * 8 / rank) ** 0.5)):
        group = {"algorithm": "dion", "eps": 1e-8, "flatten": False, "transposed": False, "packed": 1, **update}
        group["lr_scale"] = lr_scale
        state = {"momentum": momentum.clone(), "Q": torch.zeros(8, rank), "norm": torch.tensor(1.0)}
        difference = 0.1 * scale * steps
        correct_momenta_(group, {difference: state}, {difference: Correction(difference, travel=0.1, share=0.3)})
        ends.append(state["momentum"])
    torch.testing.assert_close(*ends)
    assert (ends[0] - momentum).norm() > 0.01 * momentum.norm()
