"""The mathematics of one update."""

import pytest
import torch

from lightning_curvadion.optim import dion


def matrices(k=3, m=24, n=16, rank=None, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(k, m, rank or n, generator=generator, dtype=torch.float64)
    right = torch.randn(k, rank or n, n, generator=generator, dtype=torch.float64)
    return (left @ right).to(dtype)


def assert_orthonormal(P, tolerance):
    gram = P.mT.double() @ P.double()
    torch.testing.assert_close(gram, torch.eye(P.shape[-1]).double().expand_as(gram), rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", ["qr", "cholesky", "checked_cholesky", None])
@pytest.mark.parametrize("shape", [(1, 24, 16), (5, 64, 8), (2, 16, 16), (3, 7, 1), (4, 1, 1)])
def test_orthonormal_columns_span_the_same_space_with_the_same_signs(method, shape):
    Y = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    P, reference = dion.orthonormalize(Y, method), dion.orthonormalize(Y.double(), "qr")
    assert_orthonormal(P, 1e-5)
    torch.testing.assert_close(P.double(), reference, rtol=0, atol=1e-4)
    assert ((P * Y).sum(-2) > 0).all()


@pytest.mark.parametrize("method", ["cholesky", "checked_cholesky"])
def test_cholesky_agrees_with_qr_on_badly_scaled_and_nearly_dependent_columns(method):
    Y = matrices(4, 64, 12)
    Y[:, :, 5] = Y[:, :, 4] + 1e-3 * Y[:, :, 5]
    Y = Y * torch.logspace(-6, 6, 12)
    P, reference = dion.orthonormalize(Y, method), dion.orthonormalize(Y, "qr")
    assert_orthonormal(P, 1e-4)
    projector, expected = P @ P.mT, reference @ reference.mT
    torch.testing.assert_close(projector, expected, rtol=0, atol=2e-2)


def test_the_checked_cholesky_falls_back_where_cholesky_alone_would_lose_orthogonality():
    Y = torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(1))
    Y[..., 3] = Y[..., 0] + 1e-4 * Y[..., 3]
    torch.testing.assert_close(dion.orthonormalize(Y, "checked_cholesky"), dion.orthonormalize(Y, "qr"), rtol=0, atol=0)


def test_a_matrix_that_cholesky_refuses_leaves_the_others_of_its_stack_alone():
    Y = matrices(3, 24, 8)
    expected = dion.orthonormalize(Y, "cholesky")
    Y[1] = torch.nan
    P = dion.orthonormalize(Y, "cholesky")
    assert torch.equal(P[[0, 2]], expected[[0, 2]])
    assert P[1].isnan().all(), "what is not finite stays so, and is seen"


def test_an_unknown_method_names_the_known_ones():
    with pytest.raises(ValueError, match="qr, cholesky"):
        dion.orthonormalize(torch.ones(1, 2, 1), "svd")


def one_update(B, Q, method, mu=0.9):
    P = dion.orthonormalize(dion.left_factor(B, Q), method)
    R = dion.right_factor(B, P)
    step, kept = dion.unit_columns(R, Q, 1e-8)
    M = B.clone()
    dion.feed_back_error_(M, P, R, share=1 - mu)
    return P, step, kept, M


@pytest.mark.parametrize("method", ["qr", "cholesky", "checked_cholesky"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n", "r"), [(24, 16, 4), (16, 16, 16), (9, 1, 1), (1, 1, 1)])
def test_zero_deficient_and_thin_matrices_stay_finite_in_every_dtype(method, dtype, m, n, r):
    Q = torch.stack([dion.initial_right_factor(n, r, seed, torch.empty((), dtype=dtype)) for seed in range(2)])
    for B in (
        torch.zeros(2, m, n, dtype=dtype),
        matrices(2, m, n, rank=1, dtype=dtype),
        matrices(2, m, n, dtype=dtype),
    ):
        P, step, kept, M = one_update(B, Q, method)
        for tensor in (P, step, kept, M):
            assert tensor.dtype == dtype
            assert tensor.isfinite().all()
        assert (kept.float().norm(dim=-2) > 0.9).all(), "a dead column of Q could never wake up"
        assert (step.float().norm(dim=-2) < 1.01).all()


@pytest.mark.parametrize("method", ["qr", "cholesky", "checked_cholesky"])
def test_a_momentum_of_rank_one_steps_along_that_rank_only(method):
    B = matrices(2, 24, 16, rank=1)
    Q = torch.stack([dion.initial_right_factor(16, 6, seed, B) for seed in range(2)])
    P, step, _, _ = one_update(B, Q, method)
    direction = B / torch.linalg.matrix_norm(B, keepdim=True)
    torch.testing.assert_close(P @ step.mT, direction, rtol=0, atol=1e-4)


def test_a_zero_momentum_does_not_move_the_parameters():
    parameters = [torch.ones(4, 3), torch.ones(4, 3)]
    Q = torch.stack([dion.initial_right_factor(3, 2, seed, parameters[0]) for seed in range(2)])
    P, step, _, _ = one_update(torch.zeros(2, 4, 3), Q, "qr")
    dion.descend_(parameters, P, step, lr=0.1, scale=1.0, weight_decay=0.0)
    assert all(torch.equal(parameter, torch.ones(4, 3)) for parameter in parameters)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("k", [1, 3])
def test_descend_is_the_equation(wide, k, large, monkeypatch):
    if large:
        monkeypatch.setattr(dion, "_LARGE", 1)
    P, Q = dion.orthonormalize(matrices(k, 6, 2)), dion.orthonormalize(matrices(k, 4, 2, seed=1))
    shape = (4, 6) if wide else (6, 4)
    start = [torch.randn(shape) for _ in range(k)]
    parameters = [tensor.clone() for tensor in start]
    scale = (shape[0] / shape[1]) ** 0.5
    dion.descend_(parameters, P, Q, lr=0.1, scale=scale, weight_decay=0.5)
    for i in range(k):
        update = P[i] @ Q[i].T
        expected = 0.95 * start[i] - 0.1 * scale * (update.T if wide else update)
        torch.testing.assert_close(parameters[i], expected)


def test_sharing_the_span_gives_every_replica_the_mean_inside_it_and_its_own_outside():
    own, mean, mu = matrices(1, 12, 8), matrices(1, 12, 8, seed=1), 0.9
    P = dion.orthonormalize(matrices(1, 12, 3, seed=2))
    own_R, R = dion.right_factor(own, P), dion.right_factor(mean, P)
    M = own.clone()
    dion.feed_back_error_(M, P, own_R - mu * R, share=1.0)
    inside = P @ P.mT
    torch.testing.assert_close(inside @ M, mu * (inside @ mean), rtol=0, atol=1e-4)
    torch.testing.assert_close(M - inside @ M, own - inside @ own, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("fraction", "rank"), [(0.1, 3), (0.25, 8), (1.0, 30), (0.001, 1), (0.11, 4)])
def test_rank_rounds_up_but_not_for_a_rounding_error(fraction, rank):
    assert dion.rank_of((40, 30), fraction) == rank


def test_the_start_of_Q_is_orthonormal_reproducible_and_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (dion.initial_right_factor(16, 4, seed, torch.empty(())) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert_orthonormal(first.unsqueeze(0), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 768, 192), (1, 64, 64)])
def test_on_a_gpu_the_default_method_agrees_with_qr(shape):
    Y = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    torch.testing.assert_close(dion.orthonormalize(Y), dion.orthonormalize(Y, "qr"), rtol=0, atol=1e-3)


def test_at_full_rank_a_step_depends_on_the_rounding_of_its_momentum_as_little_as_at_half_rank():
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(2, 64, 64, generator=generator))
    # Singular values over six decades, as the momentum of small batches has them.
    B = left * torch.logspace(0, -6, 64) @ torch.linalg.qr(torch.randn(2, 64, 64, generator=generator))[0]
    moved = {}
    for rank in (32, 64):
        Q = torch.stack([dion.initial_right_factor(64, rank, seed, B) for seed in range(2)])
        noisy = B + 1e-7 * torch.randn(B.shape, generator=generator)
        steps = []
        for momentum in (B, noisy):
            kept = Q
            for _ in range(20):
                P, step, kept, _ = one_update(momentum, kept, None)
            steps.append(P @ step.mT)
        moved[rank] = float((steps[0] - steps[1]).norm() / steps[0].norm())
    assert moved[64] < 3 * moved[32] + 1e-3
