"""Replicas that take different numbers of steps: the weighted mean, and what is refused."""

import itertools
import os
import random
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from models import build, parameters_of, train_step
from moves import one_after_another, recorded_moves
from paces import HETEROGENEOUS, every, steps_per_agreement
from torch import nn

from lightning_curvadion import (
    CurvaDion,
    DriftThreshold,
    EveryNSteps,
    IntegratedRMMC,
    ProcessGroupSync,
    split_parameters,
)
from lightning_curvadion.sync.pace import Pace

# python -m pytest tests/sync/test_heterogeneous.py with SCHEDULES=500 in the environment takes some minutes.
SCHEDULES = int(os.environ.get("SCHEDULES", "3"))


@contextmanager
def recorded_means(moves):
    """What this replica has moved so far, and in how many steps, where each mean begins."""
    means, weight = [], Pace.weight

    def recorded(self):
        means.append(([total.clone() for total in moves.totals], self.steps))
        return weight(self)

    with mock.patch.object(Pace, "weight", recorded):
        yield means


def weighted_mean_of_moves(means_of_all):
    """The consensus that follows from a start at zero: each displacement counts for the steps in it."""
    replicas = len(means_of_all)
    before = [([torch.zeros_like(total) for total in means[0][0]], 0.0) for means in means_of_all]
    consensus = [torch.zeros_like(total) for total in before[0][0]]
    for number in range(len(means_of_all[0])):
        now = [means[number] for means in means_of_all]
        steps = [now[i][1] - before[i][1] for i in range(replicas)]
        if sum(steps):
            for i in range(replicas):
                for end, total, earlier in zip(consensus, now[i][0], before[i][0], strict=True):
                    end += (total - earlier) * (steps[i] / sum(steps))
        before = now
    return consensus


# -- the weighted mean ------------------------------------------------------------------------------------------------


def six_and_three(rank, world, hook, syncs):
    """Rank 0 takes 6 steps, and rank 1 takes 3, between two syncs; then where they are, and what they moved."""
    # A sync step that waits for its mean has read the next agreement.
    after_sync = (False, False, True, False, True) if hook["overlap"] == 0 else (False, True)
    of_fast = itertools.chain((False, True) * 3, itertools.cycle(after_sync))
    generator = torch.Generator().manual_seed(rank)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((6, 4), (4, 6), (7,))]
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "algorithm": "adamw"}]
    optimizer = CurvaDion(groups, lr=0.05, weight_decay=0.0, trigger=EveryNSteps(3))
    optimizer.register_sync_hook(sync := ProcessGroupSync(**{**HETEROGENEOUS, **hook}))
    synced, ends = [], []
    with (
        recorded_moves(parameters) as moves,
        recorded_means(moves) as means,
        steps_per_agreement(every(1) if rank else of_fast),
    ):
        while optimizer.sync_steps < syncs:
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            moves.start()
            optimizer.step()
            if optimizer.last_step.synced:
                synced.append(sync._pace.steps)
                ends.append([parameter.detach().double() for parameter in parameters])
        sync.reach_consensus(optimizer)
    return synced, ends, means, [parameter.detach().double() for parameter in parameters], sync.global_step


@pytest.mark.parametrize("momentum", ["displacement", "local"])
def test_the_consensus_of_a_sync_step_is_weighted_by_the_steps_of_each_replica(replicas, momentum):
    hook = {"wire_format": "float32", "overlap": 0, "momentum": momentum}
    (fast, *of_fast), (slow, *of_slow) = replicas.run(2, six_and_three, hook, 4)
    assert (fast, slow) == ([7, 13, 19, 25], [4, 7, 10, 13])
    for count in range(1, 5):
        expected = weighted_mean_of_moves([of_fast[1][:count], of_slow[1][:count]])
        for own, other, mean in zip(of_fast[0][count - 1], of_slow[0][count - 1], expected, strict=True):
            assert torch.equal(own, other)
            torch.testing.assert_close(own, mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("overlap", [0, 1, 2, 3])
@pytest.mark.parametrize("wire_format", ["float32", "bfloat16", "int8", "int4", "int2", "sign"])
def test_what_quantization_keeps_back_is_sent_later(replicas, wire_format, overlap):
    hook = {"wire_format": wire_format, "overlap": overlap}
    (_, _, fast, ends, step), (_, _, slow, others, other_step) = replicas.run(2, six_and_three, hook, 5)
    assert len(fast) == len(slow) == 6 and step == other_step > 0
    for own, other, mean in zip(ends, others, weighted_mean_of_moves([fast, slow]), strict=True):
        assert torch.equal(own, other)
        torch.testing.assert_close(own, mean, rtol=1e-4, atol=2e-6)


def constant_gradients(rank, world, hook):
    """Momenta of a fast and a slow replica, which take the same steps all the time."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((6, 4), (5,))]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "algorithm": "adamw"}]
    optimizer = CurvaDion(groups, lr=0.01, weight_decay=0.0, trigger=EveryNSteps(3))
    optimizer.register_sync_hook(sync := ProcessGroupSync(**{**HETEROGENEOUS, **hook, "wire_format": "float32"}))
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(parameter.shape, generator=generator) for parameter in parameters]
    norms = []
    with steps_per_agreement(every(2 - rank)):
        while sync.global_step < 30:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
            norms.append(optimizer.state[parameters[0]]["momentum"].norm().item())
    return optimizer.sync_steps, norms


@pytest.mark.parametrize("overlap", [0, 2])
def test_a_longer_displacement_of_the_same_steps_corrects_no_momentum(replicas, overlap):
    corrected, alone = (
        replicas.run(2, constant_gradients, {"overlap": overlap, "momentum": momentum})
        for momentum in ("displacement", "local")
    )
    for (syncs, norms), (_, expected) in zip(corrected, alone, strict=True):
        assert syncs > 3
        assert norms == pytest.approx(expected, rel=0.02)


def schedule(rank, world, seed):
    """One random schedule of paces, syncs and consensus, which ends at one global step."""
    shared, own = random.Random(seed), random.Random(100 * seed + rank)
    generator = torch.Generator().manual_seed(100 * seed + rank)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((6, 4), (4, 6), (7,), (1100, 2))]
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "algorithm": "adamw"}]
    trigger = shared.choice([EveryNSteps(1), EveryNSteps(3), IntegratedRMMC(0.3), DriftThreshold(0.3)])
    optimizer = CurvaDion(groups, lr=0.05, weight_decay=0.0, trigger=trigger)
    optimizer.register_sync_hook(
        sync := ProcessGroupSync(
            wire_format=shared.choice(["float32", "int4", "sign"]),
            vector_format=shared.choice([None, "int4"]),
            momentum=shared.choice(["local", "displacement"]),
            chunk=shared.choice([2**24, 20]),
            overlap=shared.choice([0, 0, 1, 2, 3, 5]),
            heterogeneous=True,
        )
    )
    total, between = shared.uniform(5, 30), shared.uniform(3, 20)
    consensus_at = between
    with (
        recorded_moves(parameters) as moves,
        recorded_means(moves) as means,
        steps_per_agreement(own.random() < 0.6 for _ in itertools.count()),
    ):
        while sync.global_step < total:
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            parameters[3].grad[torch.rand(1100, generator=generator) < 0.9] = 0.0
            moves.start()
            optimizer.step()
            if own.random() < 0.1:
                optimizer.state_dict()  # by one replica alone
            if sync.global_step >= consensus_at:
                sync.reach_consensus(optimizer, include_state=shared.random() < 0.5)
                consensus_at = sync.global_step + between
        sync.reach_consensus(optimizer)
    return [parameter.detach().double() for parameter in parameters], means, optimizer.sync_steps


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world", [2, 3])
def test_the_consensus_is_the_weighted_mean_of_all_moves_over_random_paces(replicas, world):
    everyone = replicas.run(world, one_after_another, schedule, range(SCHEDULES), timeout=1800)
    synced = 0
    for of_one_seed in zip(*everyone, strict=True):
        ends, means, sync_steps = zip(*of_one_seed, strict=True)
        assert len({len(own) for own in means}) == len(set(sync_steps)) == 1
        synced += sync_steps[0]
        for number, mean in enumerate(weighted_mean_of_moves(means)):
            assert all(torch.equal(ends[0][number], other[number]) for other in ends[1:])
            torch.testing.assert_close(ends[0][number], mean, rtol=1e-4, atol=2e-5)
    assert synced > SCHEDULES


# -- equal paces, and one replica ------------------------------------------------------------------------------------


def equal_data(rank, world, hook):
    model, optimizer = build(hook=hook, trigger=EveryNSteps(3))
    with steps_per_agreement(every(1)):
        for step in range(10):
            train_step(model, optimizer, step, shard=0)
        if hook is not None:
            optimizer.sync_hook.reach_consensus(optimizer)
    return parameters_of(model)


@pytest.mark.parametrize("overlap", [0, 2])
def test_ranks_with_equal_data_equal_one_rank(replicas, overlap):
    alone = replicas.run(1, equal_data, None)[0]
    for world in (1, 2, 3):
        for parameters in replicas.run(world, equal_data, {**HETEROGENEOUS, "overlap": overlap}):
            torch.testing.assert_close(parameters, alone, rtol=1e-5, atol=1e-6)


def losses(rank, world, hook, steps):
    model, optimizer = build(hook=hook, trigger=IntegratedRMMC(0.3), lr=0.02)
    own = []
    with steps_per_agreement(every(1)):
        for step in range(steps):
            optimizer.zero_grad()
            tokens = torch.randint(0, 11, (24,), generator=torch.Generator().manual_seed(1000 * rank + step))
            loss = nn.functional.cross_entropy(model(tokens), (3 * tokens + 1) % 11)
            loss.backward()
            own.append(loss.item())
            optimizer.step()
    return own, optimizer.sync_steps


@pytest.mark.parametrize("overlap", [0, 2])
def test_at_equal_pace_the_losses_are_those_of_lock_step(replicas, overlap):
    shared = {"wire_format": "sign", "momentum": "displacement", "lag": 1, "overlap": overlap}
    paced = replicas.run(2, losses, {**shared, "heterogeneous": True}, 60)
    locked = replicas.run(2, losses, shared, 60)
    for (own, syncs), (other, others_syncs) in zip(paced, locked, strict=True):
        # The first step of lock-step acts on an agreement with nothing in it.
        assert abs(syncs - others_syncs) <= 1 and syncs > 5
        assert sum(own[-20:]) == pytest.approx(sum(other[-20:]), rel=0.1)
        assert sum(own[-20:]) < 0.5 * sum(own[:20])


# -- what it refuses --------------------------------------------------------------------------------------------------


def several_optimizers(rank, world):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    sync = ProcessGroupSync(heterogeneous=True)
    CurvaDion(split_parameters(model[0])).register_sync_hook(sync)
    with pytest.raises(ValueError, match="heterogeneous=True serves one optimizer"):
        CurvaDion(split_parameters(model[1])).register_sync_hook(sync)
    with pytest.raises(ValueError, match="regroup without heterogeneous=True"):
        sync.regroup(1)


def test_it_serves_one_optimizer_of_a_group_that_stays(replicas):
    replicas.run(1, several_optimizers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lag": 0}, "leave out lag=0"),
        ({"lag": 2}, "leave out lag=2"),
        ({"consensus": "none"}, "leave it out with consensus='none', momentum='dion'"),
        ({"consensus": "factors"}, "leave it out with consensus='factors', momentum='factors'"),
        ({"momentum": "average"}, "leave it out with consensus='average', momentum='average'"),
        ({"spread": 2}, "leave out spread=2"),
        ({"outer_momentum": 0.5}, "leave out outer_lr and outer_momentum"),
        ({"outer_lr": 0.5}, "leave out outer_lr and outer_momentum"),
        ({"inner_group": object()}, "leave out inner_group"),
    ],
)
def test_combinations_that_it_refuses(options, message):
    with pytest.raises(ValueError, match=f"heterogeneous=True .*{message}"):
        ProcessGroupSync(heterogeneous=True, **options)


def test_its_mean_runs_in_the_background():
    assert ProcessGroupSync(heterogeneous=True).settings.overlap == 1
    assert ProcessGroupSync(heterogeneous=True, overlap=0).settings.overlap == 0
