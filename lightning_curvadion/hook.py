"""What an optimizer asks of the thing that communicates for it; the thing itself is in ``sync.py``."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor


class SyncHook(Protocol):
    """What communicates for the optimizer. Every method is a meeting of all replicas.

    Attributes:
        rank: This replica.
        momentum: ``"factors"``, ``"dion"``, ``"average"`` or ``"local"``: what happens to momentum at a sync step.
        averages_vector_gradients: Whether vector groups step with the mean gradient at a sync step.
        bytes_sent: Payload sent so far.
    """

    rank: int
    momentum: str
    averages_vector_gradients: bool
    bytes_sent: int

    def attach(self, optimizer: Any) -> None:
        """Check that all replicas hold the same parameters, and start them from the same values."""

    def agree(self, signal: Tensor) -> None:
        """Replace a float64 tensor of two elements by the element-wise maximum over the replicas."""

    def mean_left(self, optimizer: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
        """First exchange of a sync step: the mean of each tensor over the replicas."""

    def mean_right(self, optimizer: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Second exchange of a sync step."""

    def meet(self, optimizer: Any) -> None:
        """End of a sync step: bring the parameters together."""
