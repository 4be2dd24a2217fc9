"""Checks of gradients: an unusable one becomes a number, which the replicas agree on in the all-reduce of a step."""

from collections.abc import Sequence

from torch import Tensor

_REMEDIES = (
    "has a gradient that is not finite, or too large for float16; lower the learning rate, clip gradients, or skip the"
    " batch that caused it",
    "has a sparse gradient; build the embedding with sparse=False",
    "has a complex gradient; train its real and imaginary part as two real parameters",
)
NOT_FINITE, SPARSE, COMPLEX = range(len(_REMEDIES))


def unusable_layout(gradient: Tensor) -> int | None:
    """SPARSE or COMPLEX where the gradient is one. Whether it is finite, only the device knows."""
    if gradient.is_complex():
        return COMPLEX
    return SPARSE if gradient.is_sparse or gradient.is_sparse_csr else None


def encode(kind: int, number: int, count: int, rank: int) -> int:
    """A code >= 1 of (rank, parameter, kind). The maximum over replicas is then one of their codes, and not a mixture.

    Args:
        kind: NOT_FINITE, SPARSE or COMPLEX.
        number: Index of the parameter.
        count: Parameters of the optimizer.
        rank: The replica.
    """
    return (rank * count + number) * len(_REMEDIES) + kind + 1


def describe(code: int, names: Sequence[str]) -> str:
    """The error message of a code, given the names of all parameters."""
    place, kind = divmod(code - 1, len(_REMEDIES))
    rank, number = divmod(place, len(names))
    return f"rank {rank}: {names[number]} {_REMEDIES[kind]}. No replica has taken this step."
