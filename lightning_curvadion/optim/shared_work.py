"""Shared work: what the optimizer asks of processes that hold the same replica, so that each takes a part of a step."""

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

Item = TypeVar("Item")


class SharedWork(Protocol):
    """The processes of a replica. They hold the same bits, and so the same matrices.

    Attributes:
        elements: How many numbers are worked on at a time.
    """

    elements: int

    def newton_schulz(self, momenta: Sequence[Tensor], eps: Sequence[float]) -> list[Tensor]:
        """Orthonormalise matrices, as ``muon.newton_schulz`` does. A collective among the processes.

        Args:
            momenta: Shape (k, m, n) each, the same on every process.
            eps: For each of them.
        """


def runs(items: Sequence[Item], sizes: Sequence[int], most: int) -> Iterator[list[Item]]:
    """Cut things of some sizes into runs that end where their sizes reach ``most`` together.

    Example:
        >>> list(runs("abcd", [1, 2, 3, 1], most=3))
        [['a', 'b'], ['c'], ['d']]
    """
    run: list[Item] = []
    total = 0
    for item, size in zip(items, sizes, strict=True):
        run.append(item)
        total += size
        if total >= most:
            yield run
            run, total = [], 0
    if run:
        yield run
