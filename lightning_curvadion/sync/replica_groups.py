"""Groups of replicas of which some are lost and others come: who is in a group, and at which rank.

A group forms in two phases. A replica has prepared for it once it has the common model, and trains once all have
prepared. So where one trains in a group that breaks at its beginning, the others know that they belong to it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Replica(NamedTuple):
    """What a replica tells of itself before a group forms.

    Attributes:
        generation: The last group in which it has trained: the groups of a run are numbered from 1 on.
        prepared: The last group in which it had all that it needs to train, so that another one may have trained there.
        rank: In the last group in which it has trained.
        digest: Of what it trains.
        standing: Where it stands.
    """

    generation: int
    prepared: int
    rank: int
    digest: str
    standing: dict[str, Any]


class Group(NamedTuple):
    """A group of replicas, from the view of one of them.

    Attributes:
        rank: Of this one.
        size: Number of replicas.
        trained: So many, the first ones, have trained together before.
        lost: So many more were members of their last group.
        generation: Its number.
        standings: Of the replicas, by rank.
        store: Of this group alone.
    """

    rank: int
    size: int
    trained: int
    lost: int
    generation: int
    standings: list[dict[str, Any]]
    store: Any

    @property
    def is_newcomer(self) -> bool:
        """Whether this replica takes over what others have trained."""
        return self.rank >= self.trained > 0

    def exchange(self, key: str, value: bytes, source: int = 0) -> bytes:
        """A rank's value, on all ranks."""
        if self.rank == source:
            self.store.set(key, value)
        return bytes(self.store.get(key))


def arrange(replicas: Mapping[int, Replica], number: int, members: int, store: Any) -> Group | None:
    """The group of a round: those of the last group first, in its order; ``None`` where this replica waits.

    A replica that comes back after others went on without it takes over the run as a new one does.

    Args:
        replicas: Of the round, by number.
        number: Of this one.
        members: Of the last group that it was in.
        store: Of the group.

    Example:
        >>> def ranks(*replicas):
        ...     groups = [arrange(dict(enumerate(replicas)), number, 3, None) for number in range(len(replicas))]
        ...     return [group and (group.rank, group.size, group.trained, group.lost) for group in groups]
        >>> at_step = {"place": "step"}
        >>> ranks(*(Replica(last, last, rank, "", at_step) for last, rank in [(0, 0), (3, 2), (2, 0), (3, 0)]))
        [(2, 4, 2, 0), (1, 4, 2, 1), (3, 4, 2, 0), (0, 4, 2, 1)]
        >>> ranks(Replica(0, 0, 0, "", at_step), Replica(3, 3, 0, "", {"place": "validation"}))
        [None, (0, 1, 1, 2)]
    """
    last = max(replica.generation for replica in replicas.values())
    trained = {other for other, replica in replicas.items() if last in (replica.generation, replica.prepared) and last}
    places = {replicas[other].standing.get("place") for other in trained}
    present = [
        other
        for other, replica in replicas.items()
        if other in trained or not trained or {replica.standing.get("place")} == places
    ]
    if number not in present:
        return None
    order = sorted(present, key=lambda other: (other not in trained, replicas[other].rank, other))
    standings = [replicas[other].standing for other in order]
    lost = members - len(trained) if number in trained else 0
    return Group(order.index(number), len(order), len(trained), lost, last + 1, standings, store)
