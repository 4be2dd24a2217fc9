"""The sync hook: what the optimizer asks of the thing that communicates, such as ``ProcessGroupSync``."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

# Called with an optimizer at each of its steps without a hook. Nothing here knows of other processes: sync/ does.
watchers_without_hook: list[Callable[[Any], None]] = []


class SyncHook(Protocol):
    """What communicates for the optimizer. Every method is a collective: all replicas call it.

    The optimizer alone calls what begins with an underscore; a user of the hook needs none of it.

    Attributes:
        rank: This replica.
        world_size: Number of replicas. A single one takes local steps only.
        _momentum: ``"factors"``, ``"dion"``, ``"average"`` or ``"local"``: what a sync step does to the momentum.
        _sync_rank_fraction: Rank of the momentum's factors on the wire; ``None`` for the rank of the local step.
        _averages_vector_gradients: Whether AdamW and Lion groups step with the mean gradient at a sync step.
        _lag: How many steps later an agreement is read than it is sent.
        _reads_agreement: Whether the present step acts on an agreement, and the trigger is asked.
        bytes_sent: Payload of this replica so far, in bytes.
    """

    _momentum: str
    _sync_rank_fraction: float | None
    _averages_vector_gradients: bool
    _lag: int

    @property
    def rank(self) -> int: ...  # noqa: D102

    @property
    def world_size(self) -> int: ...  # noqa: D102

    @property
    def _reads_agreement(self) -> bool: ...

    @property
    def bytes_sent(self) -> int: ...  # noqa: D102

    @property
    def _places(self) -> Sequence[str]:
        """What errors call the replicas."""

    def _attach(self, optimizer: Any) -> None:
        """Verify that all replicas hold the same parameters, and start them from the same values."""

    def _agree(self, signal: Tensor) -> tuple[float, float, float]:
        """The element-wise maximum over the replicas of a float64 tensor of two elements.

        Third comes the largest drift of any replica, times what the trigger's ``drift_factor`` says; 0 where the
        trigger watches none. With a lag, these are the numbers of so many steps before.
        """

    def _may_sync(self, optimizer: Any) -> bool:
        """Whether this step may be a sync step, the same on all replicas: not while an earlier mean is under way."""

    def _corrects_momenta(self, optimizer: Any, synced: bool) -> bool:
        """Whether a mean arrives in this step by which the optimizer's momenta are corrected.

        Args:
            optimizer: The caller.
            synced: Whether this is a sync step.
        """

    def _confirm(self) -> float:
        """Called before a sync step writes anything: the largest code of the present step, below 1 if none is unusable.

        It is 0 where the sync step begins with a step of the replica's own, and the code is read after that.
        """

    def _proceed(self, optimizer: Any) -> None:
        """Called at the end of every step: go on with what an earlier sync step has left under way."""

    def _agreed_so_far(self, optimizer: Any) -> Sequence[tuple[float, float]]:
        """RMMC and drift that the next steps of an optimizer act on, oldest first. It communicates nothing."""

    def _resume(self, optimizer: Any, agreed: Sequence[tuple[float, float]]) -> None:
        """Let the next steps act on these numbers of :meth:`_agreed_so_far`."""

    def _mean_left(self, optimizer: Any, factors: Sequence[Tensor], whole: Sequence[Tensor]) -> list[Tensor]:
        """The first mean of a sync step.

        Args:
            optimizer: The caller.
            factors: Left factors, shape (k, m, r) each. They become what this replica sent of them.
            whole: Tensors that become their means, in place.

        Returns:
            The means of the factors over the replicas.
        """

    def _mean_right(self, optimizer: Any, factors: Sequence[Tensor], whole: Sequence[Tensor]) -> list[Tensor]:
        """The second mean of a sync step, the same for right factors. It also synchronises the parameters."""
