r"""RMMC, the Relative Maximum Momentum Change: one number for how much the loss surface bends.

CurvaDion (arXiv:2512.13728) watches, for each matrix parameter l with momentum :math:`B_t = M_t + G_t`,

.. math::
    \mathrm{RMMC} = \max_l \frac{\left|\,\|B^l_t\|_F - \|B^l_{t-1}\|_F\,\right|}{\|B^l_{t-1}\|_F} .

Norms are accumulated in float32: in bfloat16 the ratio comes in steps of 1/64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# On a CPU the sum M + G is formed in half a megabyte that stays in the cache. Fresh memory for whole matrices would
# cost more than the norm itself.
_BUFFER_ELEMENTS = 2**17


def momentum_norms(momenta: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    """``||M + G||_F`` of every matrix, without changing M: nothing may be written before all replicas have agreed.

    Args:
        momenta: k contiguous tensors of one dtype and device.
        gradients: The gradient of each, ``None`` where there is none.

    Returns:
        Float32, shape (k,). Not finite where the gradient is not.

    Example:
        >>> momentum_norms([torch.ones(2, 2), torch.ones(2, 2)], [torch.ones(2, 2), None])
        tensor([4., 2.])
    """
    if momenta[0].device.type == "cpu":
        buffer = torch.empty(min(_BUFFER_ELEMENTS, momenta[0].numel()), dtype=_accumulator(momenta[0]))
        return torch.stack([_norm_of_sum(m, g, buffer) for m, g in zip(momenta, gradients, strict=True)]).float()
    sums = [m if g is None else m + g for m, g in zip(momenta, gradients, strict=True)]
    return torch.stack(torch._foreach_norm(sums, dtype=_accumulator(momenta[0]))).float()


def _norm_of_sum(momentum: Tensor, gradient: Tensor | None, buffer: Tensor) -> Tensor:
    squares = []
    momenta = momentum.view(-1).split(buffer.numel())
    gradients = [None] * len(momenta) if gradient is None else gradient.reshape(-1).split(buffer.numel())
    for m, g in zip(momenta, gradients, strict=True):
        total = buffer[: m.numel()]
        if g is None:
            total.copy_(m)
        else:
            torch.add(m, g, out=total)
        squares.append(torch.dot(total, total))
    return torch.stack(squares).sum().sqrt()


def gradient_norms(gradients: list[Tensor]) -> Tensor:
    """``||G||`` of every tensor, float32, shape (k,): the check that vector parameters get finite gradients.

    Example:
        >>> gradient_norms([torch.tensor([3.0, 4.0]), torch.tensor([torch.inf])])
        tensor([5., inf])
    """
    return torch.stack(torch._foreach_norm(gradients, dtype=_accumulator(gradients[0]))).float()


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def relative_change(norms: Tensor, previous: Tensor) -> Tensor:
    """``|norms - previous| / previous`` for every matrix.

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
