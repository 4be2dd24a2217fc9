r"""The mathematics of one Muon update: pure functions on stacks of equally shaped matrices.

Where Dion orthonormalises a momentum along a factor of lower rank, Muon (Jordan et al., 2024,
https://kellerjordan.github.io/posts/muon) orthonormalises all of it. For :math:`B = M + G` of shape (m, n)

.. math::
    O = \mathrm{NS}(G + \mu B), \quad M \leftarrow \mu B, \quad
    X \leftarrow (1 - \eta \lambda) X - \eta \sqrt{m / n}\, O ,

where :math:`G + \mu B` is Nesterov's momentum, and NS moves all singular values near one by products of matrices alone.
"""

import torch
from torch import Tensor

# Five steps of this odd polynomial take singular values from 1/500 to 1 of the largest into [0.7, 1.2]. Its slope at
# zero is what bounds a step along directions that only rounding has made: it grows them by 3.4445 ** 5 = 485.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5


def newton_schulz(U: Tensor, eps: float = 1e-8) -> Tensor:
    r"""Nearly orthonormal rows or columns: :math:`U V^\top` of the singular value decomposition, up to 30 %.

    Runs in bfloat16 on an accelerator, as ``torch.optim.Muon`` does, and in float32 at least on a CPU.

    Args:
        U: Shape (k, m, n).
        eps: Added to the norm of each matrix before the division. A matrix of zeros stays zero.

    Returns:
        Shape (k, m, n), of U's dtype.

    Example:
        >>> update = newton_schulz(torch.tensor([[[3.0, 0.0], [4.0, 0.1], [0.0, 0.1]]]))
        >>> bool((torch.linalg.svdvals(update) - 1).abs().max() < 0.32)
        True
    """
    dtype = torch.promote_types(U.dtype, torch.float32) if U.device.type == "cpu" else torch.bfloat16
    wide = U.shape[-2] < U.shape[-1]
    X = U if wide else U.mT
    # The norm before bfloat16: float16 could not hold it, and the spectral norm is no larger.
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(U.dtype, torch.float32))
    X = (X / (norm + eps)).to(dtype)
    for _ in range(_STEPS):
        gram = X @ X.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
        X = torch.baddbmm(X, polynomial, X, beta=_A)
    return (X if wide else X.mT).to(U.dtype)


def root_of_polar(polar: Tensor, M: Tensor) -> Tensor:
    r""":math:`(M^\top M)^{1/2}`, or :math:`(M M^\top)^{1/2}` of a wide matrix, given the orthonormal factor of M.

    With :math:`M = U S V^\top` and :math:`\mathrm{polar}(M) = U V^\top`, their product is :math:`V S V^\top`.

    Args:
        polar: Of M or of a matrix near it, shape (\*batch, m, n).
        M: Shape (\*batch, m, n).

    Returns:
        Float32 at least, shape (\*batch, s, s) with s the smaller side.
    """
    M = M.to(torch.promote_types(M.dtype, torch.float32))
    polar = polar.to(M.dtype)
    return M @ polar.mT if M.shape[-2] < M.shape[-1] else polar.mT @ M


def descend_(parameters: list[Tensor], update: Tensor, lr: float, scale: float, weight_decay: float) -> None:
    r"""``X <- (1 - lr weight_decay) X - lr scale update`` in place, with decoupled weight decay.

    Args:
        parameters: k matrices of shape (m, n).
        update: Shape (k, m, n).
        lr: Learning rate.
        scale: Of the shape, such as :math:`\sqrt{m / n}`; see ``lr_scale.py``.
        weight_decay: Coefficient; multiplied by the unscaled ``lr``.

    Example:
        >>> X = torch.ones(4, 1)
        >>> descend_([X], torch.ones(1, 4, 1), lr=0.1, scale=2.0, weight_decay=0.0)
        >>> X.flatten()
        tensor([0.8000, 0.8000, 0.8000, 0.8000])
    """
    torch._foreach_mul_(parameters, 1.0 - lr * weight_decay)
    torch._foreach_add_(parameters, update.unbind(), alpha=-lr * scale)
