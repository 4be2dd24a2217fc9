"""Samplers that know who takes part in a run: the samples of an epoch are shared out anew when that changes.

All replicas hold one order of the dataset, and the samples that nobody has drawn yet are its end. A division says from
which sample of its own on a replica draws every n-th of these. No sample is drawn by two replicas in an epoch. Those
that a lost replica had drawn ahead, and not trained on, are skipped.
"""

from collections.abc import Callable, Iterator, Sequence, Sized
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

# Rank of this replica, and number of replicas.
Place = Callable[[], tuple[int, int]]


class Division(NamedTuple):
    """From sample ``first`` of a replica on, it draws ``start``, ``start + stride``, ... of the epoch's order."""

    first: int
    start: int
    stride: int


class Drawn(NamedTuple):
    """What a replica has drawn in an epoch, for the others.

    Attributes:
        epoch: Number of the epoch.
        samples: So many were drawn.
        trained: So many of them were trained on, or are now.
        total: So many will be.
        first: Of the last division.
        rest: Where the rest of the order began then.
        replicas: So many shared it.
    """

    epoch: int
    samples: int
    trained: int
    total: int
    first: int
    rest: int
    replicas: int


class MemberSampler(Sampler[int]):
    """This replica's share of the training samples of an epoch.

    Args:
        dataset: Of which the samples are.
        batch_size: Of the batches into which they go.
        shuffle: Whether every epoch has an order of its own.
        seed: Of the orders, the same on all replicas.
        place: Rank of this replica, and number of replicas.
    """

    def __init__(self, dataset: Sized, batch_size: int, shuffle: bool, seed: int, place: Place) -> None:
        self._size, self._batch_size = len(dataset), batch_size
        self._shuffle, self._seed, self._place = shuffle, seed, place
        self._epoch = -1
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch; nothing where it has begun already."""
        if epoch == self._epoch:
            return
        rank, replicas = self._place()
        self._epoch, self._begin, self._samples = epoch, 0, 0
        self._first, self._rest, self._replicas = 0, 0, replicas
        self._total = self._size // replicas
        self._divisions = [Division(0, rank, replicas)]

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[int]:
        order = self._order()
        number = self._begin
        # The number of samples may change on the way.
        while number < self._total:
            self._samples = number + 1
            yield order[self._index(number) % self._size]
            number += 1

    def _order(self) -> Sequence[int]:
        if not self._shuffle:
            return range(self._size)
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return torch.randperm(self._size, generator=generator).tolist()  # type: ignore[no-any-return]

    def _index(self, number: int) -> int:
        division = next(division for division in reversed(self._divisions) if division.first <= number)
        return division.start + (number - division.first) * division.stride

    def drawn(self, batches: int) -> Drawn:
        """What this replica has drawn.

        Args:
            batches: So many were trained on in this epoch, or are now.
        """
        trained = min(batches * self._batch_size, self._samples)
        return Drawn(self._epoch, self._samples, trained, self._total, self._first, self._rest, self._replicas)

    def divide(self, trained: Sequence[Drawn], rank: int, replicas: int, lost: int, unsure: int) -> int:
        """Share out anew what nobody has drawn.

        Args:
            trained: What those have drawn that go on; the furthest one counts. The others are new.
            rank: Of this replica in the new group, in which those that go on come first.
            replicas: Number of replicas in it.
            lost: Number of replicas that are gone.
            unsure: The last so many batches may not have been trained on by these.

        Returns:
            Samples that the lost ones had drawn and may not have trained on.
        """
        furthest = max(trained)
        first = max(one.samples for one in trained)
        rest = furthest.rest + (first - furthest.first) * furthest.replicas
        ahead = first - furthest.trained
        newcomer = rank - len(trained)
        if newcomer >= 0:
            # Until the new division begins, it draws what nobody else does.
            self._divisions = [Division(furthest.trained, rest + newcomer * ahead, 1)]
            self._epoch, self._begin, self._samples = furthest.epoch, furthest.trained, furthest.trained
        rest += (replicas - len(trained)) * ahead
        self._divisions.append(Division(first, rest + rank, replicas))
        self._first, self._rest, self._replicas = first, rest, replicas
        # An epoch that has ended for one of them has ended.
        over = any(one.samples >= one.total for one in trained)
        self._total = furthest.total if over else first + max(0, self._size - rest) // replicas
        return lost * min(first, ahead + unsure * self._batch_size)


class MemberEvaluationSampler(Sampler[int]):
    """This replica's share of a dataset that is evaluated: every n-th sample, and some twice, so that all have as many.

    Args:
        dataset: Of which the samples are.
        place: Rank of this replica, and number of replicas.
    """

    def __init__(self, dataset: Sized, place: Place) -> None:
        self._size, self._place = len(dataset), place

    def __len__(self) -> int:
        return -(-self._size // self._place()[1])

    def __iter__(self) -> Iterator[int]:
        rank, replicas = self._place()
        return (number % self._size for number in range(rank, len(self) * replicas, replicas))
