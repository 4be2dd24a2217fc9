"""The replicas of an elastic run as a metric: how many there are, were lost and joined, and what that cost."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from ..sync.membership_changes import MembershipChange
from .formatting import format_duration
from .run_metric import Row, RunMetric, register_metric


@register_metric
class Members(RunMetric):
    """Number of replicas of a run that loses some and gets others, with the cost of all changes so far.

    A replica counts the changes that it was there for. How long it waited for its first group is none of the cost.

    Args:
        **options: Of ``torchmetrics.Metric``.

    Example:
        >>> members = Members()
        >>> members.update(MembershipChange("start", members=4, lost=0, joined=0, seconds=3.0))
        >>> members.update(MembershipChange("loss", members=3, lost=1, joined=0, seconds=4.0, skipped=16))
        >>> members.compute()
        tensor(3)
        >>> members.values()["membership_seconds"]
        4.0
    """

    name = "members"
    rows: ClassVar = {
        "members": Row("replicas at the end"),
        "replicas_lost": Row("replicas lost", "{:.0f}".format),
        "replicas_joined": Row("replicas joined", "{:.0f}".format),
        "membership_seconds": Row("time that losses and joins cost", format_duration),
        "seconds_per_loss": Row("  at a loss, mean", format_duration),
        "seconds_per_join": Row("  at a join, mean", format_duration),
        "samples_skipped": Row("samples skipped after losses", "{:.0f}".format),
    }
    members: Tensor
    lost: Tensor
    joined: Tensor
    skipped: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for state in ("members", "lost", "joined", "skipped"):
            self.add_state(state, torch.tensor(0), dist_reduce_fx="max")
        self._seconds: dict[str, list[float]] = {"loss": [], "join": []}

    def update(self, change: MembershipChange) -> None:
        """Add a change."""
        self.members = torch.tensor(change.members)
        if change.kind != "start":
            self.lost = self.lost + change.lost
            self.joined = self.joined + change.joined
            self.skipped = self.skipped + change.skipped
            self._seconds[change.kind].append(change.seconds)

    def compute(self) -> Tensor:
        """The number after the last change."""
        return self.members

    @override
    def observe_change(self, change: MembershipChange) -> None:
        self.update(change)

    @override
    def values(self) -> dict[str, float]:
        # Of replicas that stay the same there is nothing to say.
        if not self.update_called:
            return {}
        return {
            **super().values(),
            "replicas_lost": float(self.lost),
            "replicas_joined": float(self.joined),
            "samples_skipped": float(self.skipped),
            "membership_seconds": sum(map(sum, self._seconds.values())),
        }

    @override
    def totals(self) -> dict[str, float]:
        means = {
            f"seconds_per_{kind}": sum(seconds) / len(seconds) for kind, seconds in self._seconds.items() if seconds
        }
        return {**self.values(), **means}
