r"""The mathematics of one Dion update: pure functions on stacks of equally shaped matrices.

For a momentum :math:`B = M + G` of shape (m, n), m >= n, and a right factor Q of shape (n, r) with unit columns, Dion
(Ahn et al., 2025, arXiv:2504.05295, algorithm 1) computes

.. math::
    P = \mathrm{orth}(B Q), \quad R = B^\top P, \quad
    M \leftarrow B - (1 - \mu) P R^\top, \quad
    Q \leftarrow \mathrm{unit\ columns}(R), \quad
    X \leftarrow (1 - \eta \lambda) X - \eta \sqrt{m / n}\, P Q^\top .

Every function takes stacks, shape (k, m, n), so that k layers of one shape cost one call. A wide matrix (m < n) enters
as its transpose; only the factor :math:`\sqrt{m/n}` depends on which side is the output (fan-out over fan-in), see
``lr_scale.py``.

With decoupled momentum (several replicas, each with its own B) P and R are means over the replicas. Columns of
:math:`B_i Q_i` with opposite signs would cancel in that mean, so :func:`orthonormalize` never flips a column's sign
(local power iterations need the same: Li et al., 2021, arXiv:2002.05660).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# A column of P this close to the span of the columns before it (sine of the angle) is left to the slower, safe QR:
# Cholesky loses about (1 / sine)^2 units in the last place of orthogonality.
_SAFE_SINE = 0.1
# Columns of R below this many rounding errors of the largest one are noise of a rank-deficient momentum.
_NOISE = 32.0
# A shorter column than this share of the longest takes a shorter step. Near full rank rounding decides the directions
# of such columns, and whole steps along them would drive replicas with equal data apart.
_SHORTEST_WHOLE_STEP = 3e-3
# From this many numbers on the product of a matrix is worth a call of its own.
_LARGE = 2**18
_ORTHONORMALIZERS = ("qr", "cholesky", "checked_cholesky")


def rank_of(shape: Sequence[int], rank_fraction: float) -> int:
    """Rank of the factors of a matrix: ``ceil(rank_fraction * min(m, n))``, at least 1.

    Example:
        >>> rank_of((768, 3072), 0.25)
        192
    """
    # 0.1 * 30 is a hair above 3 in binary; that hair must not buy a fourth column.
    return max(1, math.ceil(rank_fraction * min(shape) - 1e-9))


def initial_right_factor(n: int, rank: int, seed: int, like: Tensor, batch: Sequence[int] = ()) -> Tensor:
    """Orthonormal start for Q, shape (\\*batch, n, rank): the same on every replica and without touching the global
    generators.

    Args:
        n: Rows, the smaller side of the matrix.
        rank: Columns.
        seed: Which matrix of the model this is; two layers of one shape start from different subspaces.
        like: Gives dtype and device of the result.
        batch: Dimensions that count the matrices, each of which has a start of its own.

    Example:
        >>> Q = initial_right_factor(8, 2, seed=0, like=torch.zeros(()))
        >>> torch.allclose(Q.mT @ Q, torch.eye(2), atol=1e-6)
        True
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(*batch, n, rank, generator=generator)).Q.to(like)


def left_factor(B: Tensor, Q: Tensor) -> Tensor:
    """``B Q``, shape (k, m, r): one power iteration from the right factor of the step before, not yet orthonormal.

    Example:
        >>> left_factor(torch.ones(1, 4, 3), torch.ones(1, 3, 2)).shape
        torch.Size([1, 4, 2])
    """
    return B @ Q


def right_factor(B: Tensor, P: Tensor) -> Tensor:
    """``R = B^T P``, shape (k, n, r), for an orthonormal P.

    Example:
        >>> right_factor(torch.ones(1, 4, 3), torch.ones(1, 4, 2)).shape
        torch.Size([1, 3, 2])
    """
    return B.mT @ P


def orthonormalize(Y: Tensor, method: str | None = None) -> Tensor:
    """Orthonormal columns that span those of Y, in float32 at least; column k keeps a positive product with Y's.

    Args:
        Y: Shape (k, m, r), m >= r.
        method: ``"qr"``, Householder, the reference. ``"cholesky"``, three shifted Cholesky passes (Fukaya et al.,
            2020, arXiv:1809.11085), only matrix products and never a wait for the device. ``"checked_cholesky"``, one
            Cholesky pass where the columns are far enough from dependent, QR where not; it looks at its own result,
            which costs nothing on a CPU. ``None`` takes the third on a CPU and the second elsewhere.

    Returns:
        P of Y's dtype, shape (k, m, r). Where Y has dependent columns ``"qr"`` completes the basis and ``"cholesky"``
        leaves columns near zero; both serve Dion, since :func:`unit_columns` drops what carries no momentum.

    Raises:
        ValueError: Unknown ``method``.

    Example:
        >>> P = orthonormalize(torch.tensor([[[3.0, 1.0], [4.0, 1.0], [0.0, 1.0]]]))
        >>> torch.allclose(P.mT @ P, torch.eye(2), atol=1e-6)
        True
    """
    if method is None:
        method = "checked_cholesky" if Y.device.type == "cpu" else "cholesky"
    wide_enough = Y.to(torch.promote_types(Y.dtype, torch.float32))
    if method == "qr":
        P = _by_qr(wide_enough)
    elif method == "cholesky":
        P = _by_cholesky(wide_enough)
    elif method == "checked_cholesky":
        P = _by_checked_cholesky(wide_enough)
    else:
        raise ValueError(f"method must be one of {', '.join(_ORTHONORMALIZERS)}, not {method!r}")
    return P.to(Y.dtype)


def _by_qr(Y: Tensor) -> Tensor:
    P, triangle = torch.linalg.qr(Y)
    flipped = triangle.diagonal(dim1=-2, dim2=-1) < 0
    return torch.where(flipped.unsqueeze(-2), -P, P)


def _by_cholesky(Y: Tensor) -> Tensor:
    m, r = Y.shape[-2:]
    tiny = torch.finfo(Y.dtype).tiny
    # With unit columns the squared norm in Fukaya's shift is at most r, and the smallest column is as safe as the
    # largest.
    shift = 11 * (m * r + r * (r + 1)) * torch.finfo(Y.dtype).eps
    Y = Y / torch.linalg.vector_norm(Y, dim=-2, keepdim=True).clamp_min(tiny)
    for jitter in (shift, torch.finfo(Y.dtype).eps * r, torch.finfo(Y.dtype).eps):
        gram = Y.mT @ Y
        gram.diagonal(dim1=-2, dim2=-1).add_(jitter)
        triangle, failed = torch.linalg.cholesky_ex(gram)
        P = torch.linalg.solve_triangular(triangle.mT, Y, upper=True, left=False)
        Y = torch.where((failed == 0).view(-1, 1, 1), P, Y)
    return Y


def _by_checked_cholesky(Y: Tensor) -> Tensor:
    gram = Y.mT @ Y
    triangle, failed = torch.linalg.cholesky_ex(gram)
    sine = triangle.diagonal(dim1=-2, dim2=-1) / gram.diagonal(dim1=-2, dim2=-1).sqrt()
    # Written so that NaN, from an all-zero column, takes the safe way.
    if not (bool((sine > _SAFE_SINE).all()) and not bool(failed.any())):
        return _by_qr(Y)
    # Columns this independent leave an r x r inverse that is safe to multiply with, and a product beats a solve on Y.
    identity = torch.eye(Y.shape[-1], dtype=Y.dtype, device=Y.device).expand_as(triangle)
    return Y @ torch.linalg.solve_triangular(triangle.mT, identity, upper=True)


def unit_columns(R: Tensor, Q: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Scale the columns of R to length one.

    A column that is zero, or only the rounding of a rank-deficient momentum, has no direction: it steps nowhere, and
    the next power iteration starts from the old column instead, so that a matrix without gradients can wake up later.

    Args:
        R: Shape (k, n, r).
        Q: The right factor of the step before, same shape.
        eps: Added to each length before the division; a column shorter than this has no direction either.

    Returns:
        The right factor to step with, and the one to keep.

    Example:
        >>> step, kept = unit_columns(torch.tensor([[3.0, 0.0], [4.0, 0.0]]), torch.eye(2), eps=1e-8)
        >>> step
        tensor([[0.6000, 0.0000],
                [0.8000, 0.0000]])
        >>> kept
        tensor([[0.6000, 0.0000],
                [0.8000, 1.0000]])
    """
    # Not vector_norm, which is several times slower along this dimension on a CPU.
    wide_enough = R.to(torch.promote_types(R.dtype, torch.float32))
    length = wide_enough.square().sum(dim=-2, keepdim=True).sqrt()
    noise = _NOISE * torch.finfo(length.dtype).eps * length.amax(dim=-1, keepdim=True)
    alive = (length > noise.clamp_min(eps)).to(R.dtype)
    # The inverse of a short length is infinite in float16, its product with the column is not.
    unit = (wide_enough * (alive / (length + eps))).to(R.dtype)
    shortest = _SHORTEST_WHOLE_STEP * length.amax(dim=-1, keepdim=True)
    step = (wide_enough * (alive / (length.clamp_min(shortest) + eps))).to(R.dtype)
    return step, torch.addcmul(unit, Q, 1 - alive)


def feed_back_error_(B: Tensor, P: Tensor, R: Tensor, share: float) -> None:
    """``B -= share P R^T`` in place: what the step used up leaves the momentum, what it missed stays for the next one.

    ``share = 1 - mu`` is Dion's error feedback. With ``R = R_own - mu R_mean`` and ``share = 1`` the replica's own
    part in the span of P also becomes the mean's: ``B += P (R_mean - R_own)^T`` followed by Dion's feedback, in one
    product.

    Args:
        B: Momentum with the gradient in it, shape (k, m, n); becomes the new momentum M.
        P: Orthonormal, shape (k, m, r).
        R: Shape (k, n, r).
        share: How much of the product leaves.

    Example:
        >>> B = torch.eye(2).unsqueeze(0)
        >>> feed_back_error_(B, P=torch.tensor([[[1.0], [0.0]]]), R=torch.tensor([[[1.0], [0.0]]]), share=0.05)
        >>> B[0]
        tensor([[0.9500, 0.0000],
                [0.0000, 1.0000]])
    """
    B.baddbmm_(P, R.mT, alpha=-share)


def descend_(parameters: list[Tensor], P: Tensor, Q: Tensor, lr: float, scale: float, weight_decay: float) -> None:
    r"""``X <- (1 - lr weight_decay) X - lr scale P Q^T`` in place, with decoupled weight decay.

    Args:
        parameters: k matrices of shape (m, n), or (n, m) where the stack is a transposed one.
        P: Orthonormal, shape (k, max(m, n), r).
        Q: Unit columns, shape (k, min(m, n), r).
        lr: Learning rate.
        scale: Of the shape, such as :math:`\sqrt{m / n}`; see ``lr_scale.py``.
        weight_decay: Coefficient; multiplied by the unscaled ``lr``.

    Example:
        >>> X = torch.ones(4, 1)
        >>> descend_([X], P=torch.eye(4)[None, :, :1], Q=torch.ones(1, 1, 1), lr=0.1, scale=2.0, weight_decay=0.0)
        >>> X.flatten()
        tensor([0.8000, 1.0000, 1.0000, 1.0000])
    """
    step = -lr * scale
    decay = 1.0 - lr * weight_decay
    if parameters[0].shape[0] < parameters[0].shape[1]:
        P, Q = Q, P
    if parameters[0].numel() >= _LARGE:
        # The product lands in the parameter, with no temporary of its size.
        for X, left, right in zip(parameters, P, Q.mT, strict=True):
            X.addmm_(left, right, beta=decay, alpha=step)
        return
    torch._foreach_mul_(parameters, decay)
    torch._foreach_add_(parameters, torch.bmm(P, Q.mT).unbind(), alpha=step)
