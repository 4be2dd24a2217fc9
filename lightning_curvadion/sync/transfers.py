"""Transfers: collectives under way, and what they have sent."""

from collections.abc import Iterator, Mapping, Sequence

import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from .errors import explain_failure


class SentBytes:
    """A count that process groups of the same ranks share."""

    def __init__(self) -> None:
        self.total = 0


class Transfer:
    """A collective under way.

    Args:
        work: The collective.
        result: The tensor that it writes.
        purpose: What it is for, in an error.
        ranks: Of its process group; none for all.
    """

    def __init__(self, work: dist.Work, result: Tensor, purpose: str, ranks: Sequence[int] = ()) -> None:
        self.result = result
        self._work = work
        self._purpose = purpose
        self._ranks = ranks

    def wait(self) -> Tensor:
        """The result, once all that this device computes after it comes after the collective.

        Raises:
            ReplicaLostError: Another rank has ended, or does not arrive.
        """
        with record_function("curvadion::collective"), explain_failure(self._purpose, self._ranks):
            self._work.wait()
        return self.result


class MaximumTransfer(Transfer):
    """The same, of which the element-wise maximum over the first dimension is the result."""

    def wait(self) -> Tensor:  # noqa: D102
        self.result = super().wait().amax(dim=0)
        return self.result


def complete(mean: Iterator[Transfer]) -> None:
    """Let the mean of a chunk go on to its end."""
    for transfer in mean:
        transfer.wait()


def differing_in(extremes: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of some tensors whose digests are not the same on all replicas.

    Args:
        extremes: Of the digests, as they come out of their comparison; shape (2, tensors).
        tensors: By name.
    """
    differ = (extremes[0] != ~extremes[1]).tolist()
    return {name: tensor for (name, tensor), differs in zip(tensors.items(), differ, strict=True) if differs}
