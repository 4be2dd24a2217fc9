"""AdamW and Lion, the updates of parameters that are no matrices: pure functions on lists of tensors.

Embeddings, the output head, norms and biases take them. They are local to a replica; the consensus synchronises.
"""

import torch
from torch import Tensor


def adamw_(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    steps: list[int],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float,
) -> None:
    """One step of AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101, algorithm 2), in place.

    Args:
        parameters: Changed in place, as are both moments.
        gradients: One for each parameter.
        first_moments: Running mean of the gradients.
        second_moments: Running mean of their squares.
        steps: Number of each parameter's steps, this one included, for the bias correction.
        lr: Learning rate.
        betas: Decay of the two moments.
        weight_decay: Decoupled, multiplied by ``lr``.
        eps: Added to the root of the second moment; at least the root of the smallest number of its dtype, which is
            2.4e-4 in float16. Smaller squares round to zero there, and would be divided by.
    """
    beta1, beta2 = betas
    torch._foreach_mul_(parameters, 1.0 - lr * weight_decay)
    torch._foreach_lerp_(first_moments, gradients, 1.0 - beta1)
    torch._foreach_mul_(second_moments, beta2)
    torch._foreach_addcmul_(second_moments, gradients, gradients, 1.0 - beta2)
    denominators = denominators_of(second_moments, steps, beta2, eps)
    torch._foreach_addcdiv_(parameters, first_moments, denominators, [-lr / (1.0 - beta1**step) for step in steps])


def denominators_of(second_moments: list[Tensor], steps: list[int], beta2: float, eps: float) -> list[Tensor]:
    """What AdamW divides first moments by: the root of the unbiased second moments, and eps.

    Args:
        second_moments: Of the present step.
        steps: Number of each parameter's steps.
        beta2: Decay of the second moments.
        eps: See :func:`adamw_`.

    Example:
        >>> denominators_of([torch.tensor([1.0, 4.0])], steps=[1], beta2=0.75, eps=0.5)
        [tensor([2.5000, 4.5000])]
    """
    denominators = torch._foreach_sqrt(second_moments)
    torch._foreach_div_(denominators, [(1.0 - beta2**step) ** 0.5 for step in steps])
    torch._foreach_add_(denominators, [max(eps, _smallest(moment) ** 0.5) for moment in second_moments])
    return list(denominators)


def _smallest(tensor: Tensor) -> float:
    """The smallest positive number of a tensor's dtype."""
    numbers = torch.finfo(tensor.dtype)
    return numbers.smallest_normal * numbers.eps


def lion_(
    parameters: list[Tensor],
    gradients: list[Tensor],
    momenta: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> None:
    """One step of Lion (Chen et al., 2023, arXiv:2302.06675, algorithm 2), in place.

    Args:
        parameters: Changed in place, as are the momenta.
        gradients: One for each parameter.
        momenta: Running mean of the gradients.
        lr: Learning rate; the sign makes every element move by it.
        betas: Weight of the momentum in the step, and its decay.
        weight_decay: Decoupled, multiplied by ``lr``.
    """
    beta1, beta2 = betas
    torch._foreach_mul_(parameters, 1.0 - lr * weight_decay)
    directions = torch._foreach_lerp(momenta, gradients, 1.0 - beta1)
    torch._foreach_sign_(directions)
    torch._foreach_add_(parameters, directions, alpha=-lr)
    torch._foreach_lerp_(momenta, gradients, 1.0 - beta2)
