"""Replicas that take different numbers of steps: the weighted mean, the same branches, and an end for all at once."""

import itertools
import os
import random
import time
from contextlib import contextmanager
from unittest import mock

import breaking
import preloaded
import pytest
import torch
import torch.distributed as dist
from launching import free_port
from models import build, parameters_of, train_step
from moves import recorded_moves
from replicas import counted_collectives
from torch import nn

from lightning_curvadion import (
    CurvaDion,
    DriftThreshold,
    EveryNSteps,
    IntegratedRMMC,
    ProcessGroupSync,
    split_parameters,
)
from lightning_curvadion.sync.errors import UnevenBatchesError
from lightning_curvadion.sync.pace import Pace
from lightning_curvadion.sync.pending_numbers import PendingNumbers

# python -m pytest tests/sync/test_heterogeneous.py with SCHEDULES=500 in the environment takes some minutes.
SCHEDULES = int(os.environ.get("SCHEDULES", "8"))
HETEROGENEOUS = {"heterogeneous": True, "lag": 1, "momentum": "displacement"}


@contextmanager
def steps_per_agreement(arrivals):
    """Let an agreement have arrived at a step where ``arrivals`` says so, on this replica, whatever the clocks say."""
    with mock.patch.object(PendingNumbers, "has_arrived", side_effect=arrivals):
        yield


def every(n):
    """An agreement at each n-th step."""
    return (turn % n == n - 1 for turn in itertools.count())


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


def schedules(rank, world, seeds):
    ended = []
    own = set(dist.distributed_c10d._world.pg_map)
    for seed in seeds:
        ended.append(schedule(rank, world, seed))
        # Each has groups of its own, of three threads each.
        dist.barrier()
        for group in set(dist.distributed_c10d._world.pg_map) - own:
            dist.destroy_process_group(group)
    return ended


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world", [2, 3])
def test_the_consensus_is_the_weighted_mean_of_all_moves_over_random_paces(replicas, world):
    everyone = replicas.run(world, schedules, range(SCHEDULES), timeout=1800)
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


# -- what travels, and waits ------------------------------------------------------------------------------------------


def sizes(rank, world, trigger):
    model, optimizer = build(hook={**HETEROGENEOUS, "wire_format": "sign"}, trigger=trigger)
    sent = []
    with steps_per_agreement(every(2 - rank)):
        for step in range(3 if rank else 6):
            with counted_collectives() as calls:
                train_step(model, optimizer, step, shard=rank)
            sent.append([size for _, size in calls])
            assert optimizer.last_step.bytes_sent == sum(sent[-1])
        # Or its process group would end before the last has arrived.
        optimizer.sync_hook.agreement.read(optimizer)
    return sent


@pytest.mark.parametrize(("trigger", "size"), [(EveryNSteps(99), 48), (DriftThreshold(99.0), 56)])
def test_a_step_that_reads_no_agreement_sends_nothing(replicas, trigger, size):
    fast, slow = replicas.run(2, sizes, trigger)
    assert fast == [[size], [], [size], [], [size], []]
    assert slow == [[size]] * 3


def paces(rank, world, overlap, seconds):
    """Steps of a fast and a slow replica in some seconds, and whether a step of the fast one waited for the other."""
    model, optimizer = build(hook={**HETEROGENEOUS, "wire_format": "sign", "overlap": overlap}, trigger=EveryNSteps(4))
    sync = optimizer.sync_hook
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.01)
    waits, steps = [], 0
    while sync.global_step < 12:
        time.sleep(0.1 if rank else 0.02)
        start = time.monotonic()
        optimizer.step()
        waits.append(time.monotonic() - start)
        steps += 1
    sync.reach_consensus(optimizer)
    return steps, sum(wait > 0.04 for wait in waits), optimizer.sync_steps


def test_a_fast_replica_takes_more_steps_and_waits_for_none_of_the_slow_one(replicas):
    (fast, waits, syncs), (slow, _, other_syncs) = replicas.run(2, paces, 4, 0)
    assert syncs == other_syncs > 0
    assert fast > 2 * slow
    # A machine with other jobs may stop a process for a moment.
    assert waits <= 2


# -- global step, and the end -----------------------------------------------------------------------------------------


def global_steps(rank, world):
    model, optimizer = build(hook=HETEROGENEOUS, trigger=EveryNSteps(4))
    sync = optimizer.sync_hook
    sync.global_step = 100
    seen = [sync.global_step]
    with steps_per_agreement(every(3 if rank == 0 else 1)):
        step = 0
        while sync.global_step < 110:
            train_step(model, optimizer, step, shard=rank)
            step += 1
            if sync.global_step != seen[-1]:
                seen.append(sync.global_step)
        sync.reach_consensus(optimizer, include_state=True)
    return step, seen, parameters_of(model)


def test_the_global_step_is_the_mean_and_ends_all_loops_at_one_agreement(replicas):
    (fast, seen, parameters), (slow, other_seen, others) = replicas.run(2, global_steps)
    assert (fast, slow) == (19, 7)
    assert seen == other_seen == [100, 101, 103, 105, 107, 109, 111]
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))


def ends_at_a_step_of_its_own(rank, world):
    model, optimizer = build(hook=HETEROGENEOUS, trigger=EveryNSteps(4))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.01)
    try:
        for _ in range(8):
            time.sleep(0.05 * rank)
            optimizer.step()
        optimizer.sync_hook.reach_consensus(optimizer)
    except UnevenBatchesError as error:
        return str(error)


def test_a_consensus_at_steps_of_their_own_is_an_error_on_all_and_not_a_hang(replicas):
    for message in replicas.run(3, ends_at_a_step_of_its_own):
        assert "`while sync.global_step < total`" in message and "another rank" in message


def test_without_it_there_is_no_global_step():
    with pytest.raises(ValueError, match="or use heterogeneous=True"):
        ProcessGroupSync().global_step  # noqa: B018


# -- what goes wrong --------------------------------------------------------------------------------------------------


def not_finite(rank, world, overlap, bad_rank):
    model, optimizer = build(hook={**HETEROGENEOUS, "wire_format": "sign", "overlap": overlap}, trigger=EveryNSteps(2))
    sync, raised = optimizer.sync_hook, None
    with steps_per_agreement(every(3 if rank == 0 else 1)):
        try:
            for step in range(40):
                for parameter in model.parameters():
                    parameter.grad = torch.full_like(parameter, 0.01 * (step + rank))
                if rank == bad_rank and step == 7:
                    model.up[1].weight.grad[0, 0] = float("nan")
                optimizer.step()
        except ValueError as error:
            raised = sync.global_step, str(error)
        sync.reach_consensus(optimizer, include_state=True)
    return raised, parameters_of(model)


@pytest.mark.parametrize("bad_rank", [0, 1])
@pytest.mark.parametrize("overlap", [0, 2])
def test_a_bad_gradient_of_one_replica_is_raised_on_all_at_the_same_agreement(replicas, overlap, bad_rank):
    answers = replicas.run(2, not_finite, overlap, bad_rank)
    assert len({step for (step, _), _ in answers}) == 1
    for (_, message), parameters in answers:
        assert f"rank {bad_rank}: up.1.weight has a gradient that is not finite" in message
        assert all(bool(torch.isfinite(p).all()) for p in parameters)
        assert all(torch.equal(a, b) for a, b in zip(parameters, answers[0][1], strict=True))


def stopping(rank, world):
    """Each replica ends at the step that reads the request; the slow one asks between two agreements of the fast."""
    model, optimizer = build(hook=HETEROGENEOUS, trigger=EveryNSteps(3))
    sync = optimizer.sync_hook
    with steps_per_agreement(every(4 - rank)):
        for step in range(60):
            # Withdrawn before an agreement starts.
            sync.agreement.stop_request = 0.5 if rank == 0 and step == 6 else 0.0
            train_step(model, optimizer, step, shard=rank)
            if sync.agreement.agreed_request:
                break
        sync.reach_consensus(optimizer)
    return sync.agreement.agreed_request, sync.global_step, step


def test_a_stop_request_is_agreed_on_at_the_same_agreement(replicas):
    (request, at, fast), (other_request, other_at, slow) = replicas.run(2, stopping)
    assert request == other_request == 0.5
    assert at == other_at > 0 and 6 < fast < 14 and slow < fast


def rolled_back(rank, world, whose):
    model, optimizer = build(hook={**HETEROGENEOUS, "wire_format": "sign"}, trigger=EveryNSteps(4), lr=0.05)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sync, step, loaded = optimizer.sync_hook, 0, False
    with steps_per_agreement(every(2 - rank)):
        while sync.global_step < 30:
            if sync.global_step >= 9 and not loaded:
                loaded = True
                for group in optimizer.param_groups:
                    group["lr"] = 0.0
                if rank in whose:
                    model.load_state_dict(start)
            train_step(model, optimizer, step, shard=rank)
            step += 1
        sync.reach_consensus(optimizer)
    return parameters_of(model), [start[name] for name, _ in model.named_parameters()]


def test_a_rollback_stays_where_it_is(replicas):
    for parameters, loaded in replicas.run(2, rolled_back, [0, 1]):
        torch.testing.assert_close(parameters, loaded, rtol=1e-6, atol=1e-7)


def test_a_rollback_of_one_rank_ends_equal_on_all(replicas):
    (parameters, loaded), (others, _) = replicas.run(2, rolled_back, [1])
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(parameters, loaded, strict=True))


# A fast replica, and a slow one that is killed while the other takes local steps, or waits for a mean.
KILLED = """
import os, signal, sys, time
import torch.distributed as dist
from models import build, train_step
from lightning_curvadion import EveryNSteps
dist.init_process_group("gloo")
rank, hook = dist.get_rank(), {"heterogeneous": True, "lag": 1, "momentum": "displacement", "overlap": int(sys.argv[1])}
model, optimizer = build(hook=hook, trigger=EveryNSteps(4))
for step in range(100 if rank else 100000):
    if rank == 1 and step == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02 * rank)
    train_step(model, optimizer, step, rank)
"""


@pytest.mark.parametrize("overlap", [0, 2])
def test_a_replica_that_is_killed_is_an_error_of_the_other_and_not_a_hang(tmp_path, overlap):
    (tmp_path / "loop.py").write_text(KILLED)
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [
        preloaded.start(
            tmp_path / "loop.py", str(overlap), folder=tmp_path, output=tmp_path / f"rank{rank}",
            **breaking.environment(**group, RANK=str(rank)),
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        assert [process.wait(60) for process in ranks] == [1, -9]
    finally:
        for process in ranks:
            process.kill()
    assert "ReplicaLostError: Read what rank 1 printed, if it could, and restart" in (tmp_path / "rank0").read_text()


def saved(rank, world, path):
    """A run that is saved at a consensus and goes on, beside one that resumes from there."""
    model, optimizer = build(hook={**HETEROGENEOUS, "wire_format": "sign"}, trigger=IntegratedRMMC(0.3))
    sync, step = optimizer.sync_hook, 0
    with steps_per_agreement(every(2 - rank)):
        while sync.global_step < 12:
            train_step(model, optimizer, step, shard=rank)
            step += 1
        sync.reach_consensus(optimizer, include_state=True)
        if rank == 0:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "at": sync.global_step}, path)
        dist.barrier()
    checkpoint = torch.load(path, weights_only=True)
    resumed_model, resumed = build(hook={**HETEROGENEOUS, "wire_format": "sign"}, trigger=IntegratedRMMC(0.3), seed=1)
    resumed_model.load_state_dict(checkpoint["model"])
    resumed.load_state_dict(checkpoint["optimizer"])
    resumed.sync_hook.global_step = checkpoint["at"]
    ends = []
    for one_model, one in ((model, optimizer), (resumed_model, resumed)):
        with steps_per_agreement(every(2 - rank)):
            number = step
            while one.sync_hook.global_step < 30:
                train_step(one_model, one, number, shard=rank)
                number += 1
            one.sync_hook.reach_consensus(one)
        ends.append((parameters_of(one_model), one.sync_steps))
    return ends


def test_a_saved_run_resumes_at_its_global_step(replicas, tmp_path):
    answers = replicas.run(2, saved, str(tmp_path / "checkpoint.pt"))
    for (parameters, syncs), (resumed, resumed_syncs) in answers:
        assert syncs > 0 and abs(syncs - resumed_syncs) <= 1
        for one, other in zip(parameters, resumed, strict=True):
            torch.testing.assert_close(one, other, rtol=0.1, atol=0.05)
    assert all(torch.equal(a, b) for a, b in zip(answers[0][1][0], answers[1][1][0], strict=True))


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
    assert ProcessGroupSync(heterogeneous=True).settings.overlap == 2
    assert ProcessGroupSync(heterogeneous=True, overlap=0).settings.overlap == 0
