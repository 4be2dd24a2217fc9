"""Samples of an epoch, shared out anew where replicas are lost and come."""

import random
from itertools import islice

import pytest

from lightning_curvadion.trainer.member_samplers import MemberEvaluationSampler, MemberSampler

BATCH = 3


class Replica:
    """Draws batches as a dataloader does, some of them ahead."""

    def __init__(self, size, place):
        self.sampler = MemberSampler(range(size), BATCH, shuffle=True, seed=7, place=place)
        self.batches, self.trained, self.ahead = 0, [], []
        self.draws = iter(self.sampler)

    def draw(self, ahead):
        while len(self.ahead) < ahead + 1 and (batch := list(islice(self.draws, BATCH))):
            self.ahead.append(batch)

    def train(self, ahead):
        self.draw(ahead)
        if self.ahead:
            self.batches += 1
            self.trained += self.ahead.pop(0)


class Fleet:
    """Replicas that train in step."""

    def __init__(self, size, replicas, ahead):
        self.size, self.ahead = size, ahead
        self.members = [Replica(size, lambda rank=rank: (rank, replicas)) for rank in range(replicas)]
        self.gone, self.skipped = [], 0

    def step(self):
        for member in self.members:
            member.train(self.ahead)

    def over(self):
        return all(member.batches * BATCH >= len(member.sampler) for member in self.members)

    def divide(self, lost, joined):
        trained = [member.sampler.drawn(member.batches) for member in self.members]
        replicas = len(self.members) + joined
        new = [Replica(self.size, lambda: (0, replicas)) for _ in range(joined)]
        for rank, member in enumerate([*self.members, *new]):
            skipped = member.sampler.divide(trained, rank, replicas, lost, unsure=0)
        self.skipped += skipped
        for member in new:
            member.batches, member.draws = max(trained).trained // BATCH, iter(member.sampler)
        self.members += new

    def lose(self, number):
        self.gone.append(self.members.pop(number))
        self.divide(lost=1, joined=0)

    def seen(self):
        return [sample for member in [*self.members, *self.gone] for sample in member.trained]


@pytest.mark.parametrize("ahead", [0, 2])
def test_nobody_lost_shares_an_epoch_as_a_distributed_sampler(ahead):
    fleet = Fleet(size=100, replicas=3, ahead=ahead)
    while not fleet.over():
        fleet.step()
    assert len(fleet.seen()) == len(set(fleet.seen())) == 99
    assert all(len(member.sampler) == 33 for member in fleet.members)


@pytest.mark.parametrize("ahead", [0, 1, 4])
@pytest.mark.parametrize("seed", range(25))
def test_no_sample_is_drawn_twice_and_none_forgotten(seed, ahead):
    choose = random.Random(seed)
    fleet = Fleet(size=choose.randrange(200, 400), replicas=choose.randrange(2, 5), ahead=ahead)
    while not fleet.over():
        fleet.step()
        left = len(fleet.members[0].sampler) - fleet.members[0].batches * BATCH
        if choose.random() < 0.1 and len(fleet.members) > 1:
            fleet.lose(choose.randrange(len(fleet.members)))
        elif choose.random() < 0.1 and left > 10 * BATCH:
            fleet.divide(lost=0, joined=choose.randrange(1, 3))
    assert len({(member.batches, len(member.sampler)) for member in fleet.members}) == 1
    seen = fleet.seen()
    assert len(seen) == len(set(seen))
    # Fewer are left than replicas, whoever of them is there at the end.
    assert len(seen) > fleet.size - fleet.skipped - 8


def test_every_replica_learns_how_long_the_epoch_is_now():
    fleet = Fleet(size=120, replicas=4, ahead=0)
    assert len(fleet.members[0].sampler) == 30
    for _ in range(5):
        fleet.step()
    fleet.lose(2)
    # 60 of the 120 are drawn.
    assert {len(member.sampler) for member in fleet.members} == {15 + 20}
    fleet.divide(lost=0, joined=1)
    assert {len(member.sampler) for member in fleet.members} == {15 + 15}


def test_an_epoch_that_has_ended_stays_as_long_as_it_was():
    fleet = Fleet(size=100, replicas=3, ahead=0)
    while not fleet.over():
        fleet.step()
    fleet.lose(0)
    assert {len(member.sampler) for member in fleet.members} == {33}


def test_an_epoch_begins_with_a_share_for_each_that_is_there():
    place = [0, 4]
    sampler = MemberSampler(range(120), BATCH, shuffle=False, seed=0, place=lambda: tuple(place))
    assert list(sampler) == list(range(0, 120, 4))
    place[:] = [1, 3]
    sampler.set_epoch(0)
    assert len(sampler) == 30
    sampler.set_epoch(1)
    assert list(sampler) == list(range(1, 120, 3))


@pytest.mark.parametrize("size", [1, 9, 10, 11])
def test_an_evaluation_covers_the_dataset_whoever_is_there(size):
    place = [0, 1]
    sampler = MemberEvaluationSampler(range(size), lambda: tuple(place))
    for replicas in (1, 2, 3):
        shares = []
        for rank in range(replicas):
            place[:] = [rank, replicas]
            shares.append(list(sampler))
            assert len(shares[-1]) == len(sampler)
        assert len({len(share) for share in shares}) == 1
        assert {sample for share in shares for sample in share} == set(range(size))
