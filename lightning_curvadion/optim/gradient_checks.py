"""Checks of gradients and shapes: an unusable one becomes a number, on which the replicas agree in the step."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

_REMEDIES = (
    "has a gradient that is not finite, or too large for float16; lower the learning rate, clip gradients, or skip the"
    " batch that caused it",
    "has a sparse gradient; build the embedding with sparse=False",
    "has a complex gradient; train its real and imaginary part as two real parameters",
    "has another shape than its optimizer's state; build a new optimizer after a module has changed its shape",
)
NOT_FINITE, SPARSE, COMPLEX, RESHAPED = range(len(_REMEDIES))


class UnusableGradientError(ValueError):
    """A gradient of some replica cannot be stepped with. All replicas raise it in the same step."""


def unusable_layout(gradient: Tensor) -> int | None:
    """SPARSE or COMPLEX where the gradient is one. Whether it is finite, only the device knows."""
    if gradient.is_complex():
        return COMPLEX
    return SPARSE if gradient.is_sparse or gradient.is_sparse_csr else None


def unusable_shape(parameter: Tensor, state: Mapping[str, Any]) -> int | None:
    """RESHAPED where a parameter no longer has the shape of its momentum, the first moment of AdamW and Lion."""
    momentum: Tensor = state["momentum" if "momentum" in state else "exp_avg"]
    return None if momentum.shape == parameter.shape else RESHAPED


def encode(kind: int, number: int, count: int, rank: int) -> int:
    """A code >= 1 of (rank, parameter, kind). The maximum over replicas is then one of their codes, and not a mixture.

    Args:
        kind: NOT_FINITE, SPARSE, COMPLEX or RESHAPED.
        number: Index of the parameter.
        count: Parameters of the optimizer.
        rank: The replica.
    """
    return (rank * count + number) * len(_REMEDIES) + kind + 1


def describe(code: int, names: Sequence[str], places: Sequence[str]) -> str:
    """The error message of a code, given the names of all parameters and of all replicas."""
    place, kind = divmod(code - 1, len(_REMEDIES))
    rank, number = divmod(place, len(names))
    return f"{places[rank]}: {names[number]} {_REMEDIES[kind]}. No parameter has changed by it."
