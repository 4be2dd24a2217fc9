"""MembershipChange: that replicas were lost or joined, and what it cost."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MembershipChange:
    """A change of the replicas of a run. At a loss others may have joined too, and at a join others may be lost.

    Attributes:
        kind: ``"start"`` for the first group of this replica, then what brought the replicas to form another one.
        members: Number of replicas after the change.
        lost: How many of those before the change are gone.
        joined: How many are new.
        seconds: How long the training of this replica stood still.
        skipped: Samples that nobody trains on in this epoch, because a lost replica had drawn them.

    Example:
        >>> MembershipChange("loss", members=3, lost=1, joined=0, seconds=4.1, skipped=8).members
        3
    """

    kind: Literal["start", "loss", "join"]
    members: int
    lost: int
    joined: int
    seconds: float
    skipped: int = 0
