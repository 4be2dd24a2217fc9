"""Matrices of one shape step in stacks as they step alone."""

import pytest
import torch
from models import matrix, with_gradients
from torch import nn

from lightning_curvadion import CurvaDion


@pytest.mark.parametrize("local_update", ["muon", "dion"])
def test_stacked_matrices_step_like_matrices_alone(local_update):
    torch.manual_seed(0)
    together = [matrix(6, 4) for _ in range(3)] + [matrix(4, 6) for _ in range(2)] + [matrix(5, 5)]
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    one = CurvaDion(together, local_update=local_update)
    many = [CurvaDion([p], local_update=local_update) for p in alone]
    one.init_state()
    for p, q, optimizer in zip(together, alone, many, strict=True):
        optimizer.init_state()
        optimizer.state[q]["Q"].copy_(one.state[p]["Q"])
    for step in range(4):
        with_gradients(*together, seed=step)
        one.step()
        for p, q, optimizer in zip(together, alone, many, strict=True):
            q.grad = p.grad.clone()
            optimizer.step()
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rank_fraction", "cheaper"), [(0.375, False), (0.5, True), (1.0, True)])
def test_a_matrix_is_averaged_whole_where_its_factors_are_no_smaller(rank_fraction, cheaper):
    (stack,) = CurvaDion([matrix(8, 8)], rank_fraction=rank_fraction).matrix_stacks()
    assert stack.averaging_is_cheaper == cheaper
