r"""RMMC, the Relative Maximum Momentum Change: one number for how much the loss surface bends.

CurvaDion (arXiv:2512.13728) watches, for each matrix parameter l with momentum :math:`B_t = M_t + G_t`,

.. math::
    \mathrm{RMMC} = \max_l \frac{\left|\,\|B^l_t\|_F - \|B^l_{t-1}\|_F\,\right|}{\|B^l_{t-1}\|_F} .

Here the maximum runs over one momentum more: the first moments of all AdamW and Lion parameters, taken as one vector
:math:`B_t = \beta B_{t-1} + (1 - \beta) G_t`. So every parameter counts, and a model without a single matrix has an
RMMC too. Tensor by tensor they would drown the matrices: the momentum of a bias is a few numbers, and noise changes its
norm at every step. In the main job (``configs/byte_gpt.yaml``) the median of RMMC is 0.087 over the matrices alone and
0.091 with the one vector (sync steps: 167 and 171 of 600), but 0.105 with a vector for each group (202) and 0.21 with
one for each tensor (322).

Norms are accumulated in float32: in bfloat16 the ratio comes in steps of 1/64.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

# On a CPU the sum M + G is formed in half a megabyte that stays in the cache. Fresh memory for whole matrices would
# cost more than the norm itself.
_BUFFER_ELEMENTS = 2**17


def momentum_norms(momenta: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    """``||M + G||_F`` of every matrix, without changing M: nothing may be written before all replicas have agreed.

    Args:
        momenta: k tensors of one dtype and device.
        gradients: The gradient of each, ``None`` where there is none.

    Returns:
        Float32, shape (k,). Not finite where the gradient is not, or where the norm is too large for float16 momenta:
        their products with Q and P could overflow.

    Example:
        >>> momentum_norms([torch.ones(2, 2), torch.ones(2, 2)], [torch.ones(2, 2), None])
        tensor([4., 2.])
    """
    if momenta[0].device.type == "cpu":
        elements = max(min(_BUFFER_ELEMENTS, momenta[0].numel()), momenta[0].shape[-1])
        buffer = torch.empty(elements, dtype=_accumulator(momenta[0]))
        norms = torch.stack([_norm_of_sum(m, g, buffer) for m, g in zip(momenta, gradients, strict=True)]).float()
    else:
        norms = tensor_norms([m if g is None else m + g for m, g in zip(momenta, gradients, strict=True)])
    if momenta[0].dtype == torch.float16:
        norms = norms.masked_fill(norms > torch.finfo(torch.float16).max, torch.inf)
    return norms


def _norm_of_sum(momentum: Tensor, gradient: Tensor | None, buffer: Tensor) -> Tensor:
    squares = []
    if momentum.is_contiguous():
        momentum, gradient, size = momentum.view(-1), None if gradient is None else gradient.reshape(-1), buffer.numel()
    else:
        # A block of columns: some rows at a time, as they lie.
        size = buffer.numel() // momentum.shape[-1]
    momenta = momentum.split(size)
    gradients = [None] * len(momenta) if gradient is None else gradient.split(size)
    for m, g in zip(momenta, gradients, strict=True):
        total = buffer[: m.numel()]
        if g is None:
            total.view(m.shape).copy_(m)
        else:
            torch.add(m, g, out=total.view(m.shape))
        squares.append(torch.dot(total, total))
    return torch.stack(squares).sum().sqrt()


def tensor_norms(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of every tensor, float32, shape (k,).

    Example:
        >>> tensor_norms([torch.tensor([3.0, 4.0]), torch.tensor([torch.inf])])
        tensor([5., inf])
    """
    return torch.stack(torch._foreach_norm(list(tensors), dtype=_accumulator(*tensors))).float()


def first_moment_norms(moments: list[Tensor], gradients: Sequence[Tensor | None], beta: float) -> Tensor:
    """``||beta M + (1 - beta) G||`` of every first moment: what the step is about to write, without writing it.

    Args:
        moments: First moments of AdamW or Lion.
        gradients: The gradient of each, ``None`` where there is none: its moment stays as it is.
        beta: Decay of the moments.

    Returns:
        Float32, shape (k,). Not finite where the gradient is not.

    Example:
        >>> first_moment_norms([torch.zeros(4), torch.ones(4)], [torch.ones(4), None], beta=0.75)
        tensor([0.5000, 2.0000])
    """
    towards = [m if g is None else g for m, g in zip(moments, gradients, strict=True)]
    return tensor_norms(torch._foreach_lerp(moments, towards, 1.0 - beta))


def norms_before_feedback(momenta: Sequence[Tensor], R: Tensor, mu: float) -> Tensor:
    """``||B||`` of every matrix, given what error feedback left of it: ``M = B - (1 - mu) P R^T`` with ``R = B^T P``.

    The columns of P are orthonormal, so ``||B||^2 = ||M||^2 + (1 - mu^2) ||R||^2``.

    Args:
        momenta: k matrices M.
        R: Shape (k, n, r).
        mu: Momentum decay.

    Example:
        >>> norms_before_feedback([torch.tensor([[1.5], [4.0]])], R=torch.tensor([[[3.0]]]), mu=0.5)  # B = [[3], [4]]
        tensor([5.])
    """
    used = torch.linalg.vector_norm(R, dim=(-2, -1), dtype=_accumulator(R)).float()
    return torch.sqrt(tensor_norms(momenta).square() + (1.0 - mu**2) * used.square())


def norm_ratios(norms: Tensor, others: Tensor) -> Tensor:
    """``norms / others``, and 1 where there is nothing to compare with.

    Example:
        >>> norm_ratios(torch.tensor([3.0, 0.0]), torch.tensor([2.0, 0.0]))
        tensor([1.5000, 1.0000])
    """
    return torch.where(others == 0, 1.0, norms / others)


def _accumulator(*tensors: Tensor) -> torch.dtype:
    return functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors}, torch.float32)


def relative_change(norms: Tensor, previous: Tensor) -> Tensor:
    """``|norms - previous| / previous`` for every momentum.

    Args:
        norms: Norms of this step, shape (k,).
        previous: Norms of the step before; infinite where there was none, and the change counts as infinite then.

    Returns:
        Shape (k,), never NaN: a momentum that stays zero has not changed.

    Example:
        >>> relative_change(torch.tensor([3.0, 0.0, 1.0]), torch.tensor([2.0, 0.0, torch.inf]))
        tensor([0.5000, 0.0000,    inf])
    """
    change = (norms - previous).abs() / previous
    change = change.nan_to_num(nan=0.0, posinf=torch.inf)
    return torch.where(previous.isinf(), torch.inf, change)
