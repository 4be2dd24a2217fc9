"""Gradients that cannot be used, as one number that all replicas can agree on."""

from collections.abc import Sequence

from torch import Tensor

_REMEDIES = (
    "has a gradient that is not finite; lower the learning rate, clip gradients, or skip the batch that caused it",
    "has a sparse gradient; build the embedding with sparse=False",
    "has a complex gradient; train its real and imaginary part as two real parameters",
)
NOT_FINITE, SPARSE, COMPLEX = range(len(_REMEDIES))


def layout_fault(gradient: Tensor) -> int | None:
    """SPARSE or COMPLEX where the gradient is; what its numbers are is for the device to say."""
    if gradient.is_complex():
        return COMPLEX
    return SPARSE if gradient.is_sparse or gradient.is_sparse_csr else None


def encode(kind: int, number: int, count: int, rank: int) -> int:
    """A positive code of (rank, parameter, kind). The maximum over replicas picks one fault whole, not parts of two.

    Args:
        kind: NOT_FINITE, SPARSE or COMPLEX.
        number: Which of the ``count`` parameters.
        count: Parameters of the optimizer.
        rank: Which replica.
    """
    return (rank * count + number) * len(_REMEDIES) + kind + 1


def describe(code: int, names: Sequence[str]) -> str:
    """The error message of a code, given the names of all parameters."""
    place, kind = divmod(code - 1, len(_REMEDIES))
    rank, number = divmod(place, len(names))
    return f"rank {rank}: {names[number]} {_REMEDIES[kind]}. No replica has taken this step."
