"""RMMC."""

import pytest
import torch
from models import with_gradients

from lightning_curvadion import CurvaDion, RMMCThreshold
from lightning_curvadion.optim.rmmc import first_moment_norms, momentum_norms, relative_change, tensor_norms


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(3, 5), (700, 400)])
def test_the_norm_is_that_of_the_sum_and_nothing_is_written(dtype, size):
    momenta = [torch.randn(size, dtype=dtype) for _ in range(3)]
    gradients = [torch.randn(size, dtype=dtype), None, torch.randn(size[::-1], dtype=dtype).T]
    before = [m.clone() for m in momenta]
    norms = momentum_norms(momenta, gradients)
    expected = torch.stack(
        [(m.double() if g is None else m.double() + g.double()).norm() for m, g in zip(momenta, gradients, strict=True)]
    )
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms.double(), expected, rtol=2e-6 if dtype != torch.bfloat16 else 2e-3, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(momenta, before, strict=True))


def test_bfloat16_norms_are_not_quantised():
    momenta = [torch.full((64, 64), 1.0 + 2**-7 * i, dtype=torch.bfloat16) for i in range(8)]
    norms = momentum_norms(momenta, [None] * 8)
    torch.testing.assert_close(norms, torch.tensor([64 * (1.0 + 2**-7 * i) for i in range(8)]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [0, -1])
def test_one_bad_number_makes_the_norm_not_finite(bad, where):
    gradient = torch.zeros(600, 400)
    gradient.view(-1)[where] = bad
    assert not momentum_norms([torch.ones(600, 400)], [gradient]).isfinite().any()
    assert not first_moment_norms([torch.ones(600, 400)], [gradient], beta=0.9).isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("algorithm", ["adamw", "lion"])
def test_the_norm_of_a_first_moment_is_that_of_what_the_step_writes(dtype, algorithm):
    parameters = [torch.nn.Parameter(torch.zeros(9, dtype=dtype)) for _ in range(3)]
    optimizer = CurvaDion([{"params": parameters, "algorithm": algorithm}], betas=(0.8, 0.6))
    for step in range(3):
        with_gradients(*parameters, seed=step)
        parameters[1].grad = None if step else parameters[1].grad
        moments = [optimizer.state[p].get("exp_avg", torch.zeros_like(p)) for p in parameters]
        before = [m.clone() for m in moments]
        norms = first_moment_norms(moments, [p.grad for p in parameters], 0.8 if algorithm == "adamw" else 0.6)
        assert all(torch.equal(a, b) for a, b in zip(moments, before, strict=True))
        optimizer.step()
        assert torch.equal(norms, tensor_norms([optimizer.state[p]["exp_avg"] for p in parameters]))


def test_relative_change():
    inf = torch.inf
    previous = torch.tensor([2.0, 2.0, inf, 0.0, 0.0])
    norms = torch.tensor([3.0, 1.0, 0.0, 0.0, 1.0])
    assert relative_change(norms, previous).tolist() == [0.5, 0.5, inf, 0.0, inf]


def test_the_optimizer_reports_the_largest_change_of_any_matrix():
    parameters = [torch.nn.Parameter(torch.zeros(4, 3)), torch.nn.Parameter(torch.zeros(5, 5))]
    optimizer = CurvaDion(parameters, trigger=RMMCThreshold(1e9), max_local_steps=None, mu=0.5, rank_fraction=1.0)
    norms = []
    for step in range(4):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        optimizer.init_state()
        norms.append([(optimizer.state[p]["momentum"] + p.grad).norm() for p in parameters])
        optimizer.step()
        if step == 0:
            assert optimizer.last_step.rmmc == float("inf")
        else:
            changes = [abs(b - a) / a for a, b in zip(norms[-2], norms[-1], strict=True)]
            assert optimizer.last_step.rmmc == pytest.approx(max(changes).item(), rel=1e-4)
