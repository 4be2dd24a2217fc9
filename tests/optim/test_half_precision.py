"""Parameters in float16 and bfloat16, without a gradient scaler: finite after gradients of any size."""

import pytest
import torch
from torch import nn

from lightning_curvadion import CurvaDion
from lightning_curvadion.optim.adamw_lion import adamw_

GROUPS = [
    {"algorithm": "dion"},
    {"algorithm": "dion", "local_update": "sgd", "local_lr": 1e-4},
    {"algorithm": "adamw"},
    {"algorithm": "lion"},
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-7, 3e-6, 6e-5, 1e-3, 1.0, 1e2])
@pytest.mark.parametrize("rank_fraction", [0.5, 1.0])
def test_steps_on_tiny_and_large_gradients_stay_finite_and_small(dtype, group, scale, rank_fraction):
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(24, 16).to(dtype))
    optimizer = CurvaDion([{"params": [parameter], **group}], lr=0.01, weight_decay=0.0, rank_fraction=rank_fraction)
    before = parameter.detach().clone()
    for _ in range(10):
        parameter.grad = (scale * torch.randn(24, 16)).to(dtype)
        optimizer.step()
    tensors = [parameter, *(value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor))]
    assert all(tensor.isfinite().all() for tensor in tensors)
    assert (parameter - before).abs().max() < 0.2
    if scale == 0.0:
        assert torch.equal(parameter, before)
    elif scale >= 6e-5:
        assert not torch.equal(parameter, before)


def test_a_momentum_too_large_for_float16_is_an_error_before_anything_has_changed():
    parameter = nn.Parameter(torch.randn(256, 256).to(torch.float16))
    optimizer = CurvaDion([parameter])
    parameter.grad = torch.full_like(parameter, 100.0)
    optimizer.step()
    with pytest.raises(ValueError, match=r"too large for float16; .*clip gradients"):  # noqa: PT012
        for _ in range(20):
            before = parameter.detach().clone()
            optimizer.step()
    assert parameter.isfinite().all() and torch.equal(parameter, before)


def test_in_float16_eps_of_adamw_is_the_root_of_the_smallest_number():
    p, g, m, v = (torch.full((3,), x, dtype=torch.float16) for x in (0.0, 0.01, 0.0, 0.0))
    adamw_([p], [g], [m], [v], [1], lr=0.1, betas=(0.9, 0.95), weight_decay=0.0, eps=1e-8)
    assert p.tolist() == pytest.approx(3 * [-0.1 * 0.01 / (0.01 + 2.0**-12)], rel=0.02)
