"""Recovery: what replicas that survive the loss of another one do with the operation that it cut in half.

All replicas run one sequence of joint operations: the steps of their optimizers, and between them barriers, reductions
and consensuses. A loss may reach one replica in an operation that another one has left already. It is never more than
one operation behind: every operation but a step ends with a barrier, and a step needs what all have sent before.

The survivors form a group, compare their positions in the sequence, and meet at the furthest one. A step that was cut
in half becomes a local step: nothing of it is lost. Any other operation is run again, unless one of them has left it.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from .collectives import meet
from .errors import ReplicaLostError

T = TypeVar("T")


class Recovery:
    """Counts the joint operations of this replica, and continues them in a new group.

    Args:
        form_group: Forms a group of the survivors, given where this one stands, and returns where each stands.

    Attributes:
        position: Number of joint operations begun.
        active: Whether operations are counted: the same on all replicas.
    """

    def __init__(self, form_group: Callable[[Mapping[str, Any]], list[dict[str, Any]]]) -> None:
        self.position = 0
        self.active = False
        self._form_group = form_group
        # Operations up to this one are behind the furthest replica.
        self._left_behind = 0

    def begin_step(self) -> bool:
        """Count the step of an optimizer; whether all replicas take it together."""
        self.position += self.active
        return self.position > self._left_behind or not self.active

    def survive_step(self) -> None:
        """Form a group after a step that was cut in half."""
        self._meet(again=False)

    def run(self, operation: Callable[[], T]) -> T:
        """Run an operation between steps, in a new group again where it was cut in half.

        Args:
            operation: Joint, and the same if it is run twice.

        Raises:
            ReplicaLostError: Nothing recovers from it before training, and after it.
        """
        if not self.active:
            return operation()
        self.position += 1
        results: list[T] = []
        while self.position > self._left_behind or not results:
            try:
                results.append(operation())
                meet("a barrier")
                break
            except ReplicaLostError:
                self._meet(again=True)
        return results[-1]

    def meet_newcomers(self) -> None:
        """Form a group with others that wait to take part; all replicas call it at the same place."""
        self.position += 1
        while self.position > self._left_behind:
            if self._meet(again=True, place="batch"):
                return

    def take_over(self, position: int) -> None:
        """Count from where the others are, as a replica that comes does."""
        self.position, self.active = position, True

    def _meet(self, again: bool, place: str = "operation") -> bool:
        """Form a group; whether all stand at the same position and place."""
        standings = self._form_group({"place": place, "position": self.position, "again": again})
        furthest = max(standing["position"] for standing in standings)
        repeated = all(standing["again"] for standing in standings if standing["position"] == furthest)
        self._left_behind = furthest - 1 if repeated else furthest
        return all((standing["place"], standing["position"]) == (place, self.position) for standing in standings)
