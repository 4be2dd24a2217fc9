"""What an optimizer asks of the thing that communicates for it; the thing itself is in ``sync.py``."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor


class SyncHook(Protocol):
    """What communicates for the optimizer. Every method is a meeting of all replicas.

    Attributes:
        rank: This replica.
        momentum: ``"factors"``, ``"dion"``, ``"average"`` or ``"local"``: what happens to momentum at a sync step.
        sync_rank_fraction: Rank of the factors that momentum meets through, ``None`` for the rank of the step.
        averages_vector_gradients: Whether vector groups step with the mean gradient at a sync step.
        bytes_sent: Payload sent so far.
    """

    momentum: str
    sync_rank_fraction: float | None
    averages_vector_gradients: bool

    @property
    def rank(self) -> int: ...  # noqa: D102

    @property
    def bytes_sent(self) -> int: ...  # noqa: D102

    def attach(self, optimizer: Any) -> None:
        """Check that all replicas hold the same parameters, and start them from the same values."""

    def agree(self, signal: Tensor) -> tuple[float, float]:
        """The element-wise maximum over the replicas of a float64 tensor of two elements."""

    def mean_left(self, optimizer: Any, factors: Sequence[Tensor], whole: Sequence[Tensor]) -> list[Tensor]:
        """First exchange of a sync step.

        Args:
            optimizer: Who asks.
            factors: Left factors, shape (k, m, r).
            whole: Tensors that become their means, in place.

        Returns:
            The means of the factors; the factors themselves become what this replica sent of them.
        """

    def mean_right(self, optimizer: Any, factors: Sequence[Tensor], whole: Sequence[Tensor]) -> list[Tensor]:
        """Second exchange of a sync step, the same for right factors; also brings the parameters together."""
