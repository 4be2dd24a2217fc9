"""Overlap: a mean in the background loses nothing, whatever happens while it is under way."""

import os
import random

import pytest
import torch
from models import build, equal, parameters_of, state_of, train_step
from moves import one_after_another, recorded_moves
from replicas import counted_collectives
from torch import nn

from lightning_curvadion import (
    CommunicationBudget,
    CurvaDion,
    DriftThreshold,
    EveryNSteps,
    IntegratedRMMC,
    ProcessGroupSync,
    split_parameters,
)

# python -m pytest tests/sync/test_overlap.py with SCHEDULES=500 in the environment takes some minutes.
SCHEDULES = int(os.environ.get("SCHEDULES", "15"))


def schedule(rank, world, seed):
    """One random schedule of steps, syncs and consensus: what all replicas moved, and where they end."""
    choice = random.Random(seed)
    generator = torch.Generator().manual_seed(100 * seed + rank)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((6, 4), (4, 6), (7,))]
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "algorithm": "adamw"}]
    optimizer = CurvaDion(groups, lr=0.05, weight_decay=0.0, trigger=EveryNSteps(choice.choice([1, 2, 3, 5])))
    optimizer.register_sync_hook(
        ProcessGroupSync(
            wire_format=choice.choice(["float32", "bfloat16", "int8", "int4", "int2", "sign"]),
            momentum=choice.choice(["local", "displacement"]),
            spread=choice.choice([1, 1, 2]),
            chunk=choice.choice([2**24, 20]),
            lag=choice.choice([0, 1, 3]),
            overlap=choice.choice([1, 2, 3, 6]),
        )
    )
    with recorded_moves(parameters) as moves:
        for _ in range(choice.randrange(5, 25)):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            moves.start()
            optimizer.step()
            if choice.random() < 0.1:
                optimizer.sync_hook.reach_consensus(optimizer, include_state=choice.random() < 0.5)
    optimizer.sync_hook.reach_consensus(optimizer)
    return [parameter.detach().double() for parameter in parameters], moves.totals


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world", [2, 3])
def test_the_consensus_is_the_start_and_the_mean_of_all_moves_over_random_schedules(replicas, world):
    everyone = replicas.run(world, one_after_another, schedule, range(SCHEDULES), timeout=1800)
    for of_one_seed in zip(*everyone, strict=True):
        ends, moves = zip(*of_one_seed, strict=True)
        for number, end in enumerate(ends[0]):
            assert all(torch.equal(end, other[number]) for other in ends[1:])
            mean = sum(own[number] for own in moves) / world
            torch.testing.assert_close(end, mean, rtol=1e-4, atol=2e-5)


IN_BACKGROUND = {"wire_format": "sign", "momentum": "displacement", "lag": 2, "overlap": 3}
HOOKS = [
    IN_BACKGROUND,
    {"wire_format": "float32", "momentum": "local", "overlap": 1},
    {"wire_format": "int4", "momentum": "displacement", "lag": 1, "overlap": 2, "spread": 2},
    {"wire_format": "int8", "momentum": "displacement", "overlap": 4, "outer_lr": 0.7, "outer_momentum": 0.6},
    {"wire_format": "float32", "momentum": "factors", "lag": 1, "overlap": 0},
    {"wire_format": "float32", "momentum": "average", "lag": 3, "overlap": 0},
]


def saved_in_flight(rank, world, hook, saved_after, path):
    """A run that is saved while a mean is under way and goes on, beside one that resumes from there."""
    model, optimizer = build(hook=hook, trigger=IntegratedRMMC(0.3))
    for step in range(saved_after):
        train_step(model, optimizer, step, shard=rank)
    under_way = optimizer.sync_hook._overlap.under_way(optimizer)
    optimizer.sync_hook.reach_consensus(optimizer, include_state=True)
    if rank == 0:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    torch.distributed.barrier()
    saved = torch.load(path, weights_only=True)
    other_model, other = build(hook=hook, trigger=IntegratedRMMC(0.3), seed=1)
    other_model.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    reports = []
    for step in range(saved_after, saved_after + 12):
        train_step(model, optimizer, step, shard=rank)
        train_step(other_model, other, step, shard=rank)
        ours, theirs = optimizer.last_step, other.last_step
        reports.append((ours.synced, (ours.rmmc, ours.synced) == (theirs.rmmc, theirs.synced)))
    optimizer.sync_hook.reach_consensus(optimizer)
    other.sync_hook.reach_consensus(other)
    a, b = state_of(optimizer), state_of(other)
    differing = [key for key in a if not (torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key])]
    return under_way, any(synced for synced, _ in reports), all(same for _, same in reports), differing


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("hook", HOOKS, ids=str)
def test_a_run_saved_in_the_middle_of_a_flight_resumes_bit_for_bit(replicas, world, hook, tmp_path):
    in_flight = []
    for saved_after in (5, 6, 7):
        path = str(tmp_path / f"{saved_after}.pt")
        for under_way, synced, same_branches, differing in replicas.run(
            world, saved_in_flight, hook, saved_after, path
        ):
            assert synced and same_branches and not differing
            in_flight.append(under_way)
    assert any(in_flight) == (hook["overlap"] > 0)


# -- branches, and waits ----------------------------------------------------------------------------------------------


def branches(rank, world, hook, trigger, steps=14):
    model, optimizer = build(hook=hook, trigger=trigger)
    reports, calls_of = [], []
    for step in range(steps):
        with counted_collectives() as calls:
            train_step(model, optimizer, step, shard=rank)
        reports.append(optimizer.last_step)
        calls_of.append([size for _, size in calls])
        assert optimizer.last_step.bytes_sent == sum(calls_of[-1])
    return [(report.rmmc, report.synced) for report in reports], calls_of, parameters_of(model)


@pytest.mark.parametrize("trigger", [IntegratedRMMC(0.3), CommunicationBudget(0.3), DriftThreshold(0.02)], ids=str)
def test_every_rank_takes_the_same_branch(replicas, trigger):
    decisions = [reports for reports, *_ in replicas.run(3, branches, IN_BACKGROUND, trigger)]
    assert decisions[0] == decisions[1] == decisions[2]
    assert {synced for _, synced in decisions[0]} == {True, False}


@pytest.mark.parametrize("lag", [1, 3])
def test_the_trigger_sees_the_rmmc_of_as_many_steps_before_as_the_lag_says(replicas, lag):
    quiet = {"wire_format": "float32", "momentum": "local"}
    now, late = (replicas.run(2, branches, {**quiet, "lag": n}, EveryNSteps(99))[0][0] for n in (0, lag))
    assert [rmmc for rmmc, _ in late[:lag]] == [0.0] * lag
    assert [rmmc for rmmc, _ in late[lag:]] == [rmmc for rmmc, _ in now[:-lag]]


@pytest.mark.parametrize(("world", "overlap"), [(2, 3), (3, 4)])
def test_a_mean_is_taken_over_as_many_steps_later_as_overlap_says(replicas, world, overlap):
    hook = {"wire_format": "sign", "momentum": "local", "overlap": overlap}
    period = overlap + 2
    for _, calls, _ in replicas.run(world, branches, hook, EveryNSteps(period)):
        # The digests of three buffers and the parameters, at two steps of the flight; then nothing but agreements.
        sync_steps = calls[period - 1 :: period]
        assert all(own == [16, 3 * 16] for own in sync_steps)
        assert [16] in calls and all(own[0] == 16 for own in calls)
    # Only the merge changes the parameters by more than a step at a learning rate of zero.
    answers = replicas.run(world, still_after, hook, period)
    for moved in answers:
        assert [step for step, changed in enumerate(moved) if changed] == [period - 1 + overlap]


def still_after(rank, world, hook, period):
    """Whether the parameters change, for each step of a run that moves nothing itself from the sync step on."""
    model, optimizer = build(hook=hook, trigger=EveryNSteps(period))
    changed = []
    for step in range(2 * period - 1):
        if step == period - 1:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
        before = parameters_of(model)
        train_step(model, optimizer, step, shard=rank)
        moved = any(not torch.equal(a, b) for a, b in zip(before, parameters_of(model), strict=True))
        changed.append(moved and step >= period - 1)
    return changed


def sync_steps_of(rank, world, overlap):
    model, optimizer = build(hook={"momentum": "local", "overlap": overlap}, trigger=EveryNSteps(2))
    synced = []
    for step in range(12):
        train_step(model, optimizer, step, shard=rank)
        synced.append(optimizer.last_step.synced)
    return [step for step, sync in enumerate(synced) if sync]


@pytest.mark.parametrize(
    ("overlap", "expected"), [(0, [1, 3, 5, 7, 9, 11]), (2, [1, 3, 5, 7, 9, 11]), (3, [1, 4, 7, 10]), (5, [1, 6, 11])]
)
def test_a_sync_that_comes_due_during_a_flight_begins_when_it_ends(replicas, overlap, expected):
    assert replicas.run(2, sync_steps_of, overlap) == [expected, expected]


def test_ranks_with_equal_data_equal_one_rank(replicas):
    def ends(world, hook):
        return [parameters for *_, parameters in replicas.run(world, equal_data, hook)]

    alone = ends(1, None)[0]
    for world, momentum in ((2, "displacement"), (3, "local")):
        for parameters in ends(world, {"wire_format": "float32", "momentum": momentum, "lag": 1, "overlap": 2}):
            torch.testing.assert_close(parameters, alone, rtol=1e-5, atol=1e-6)


def equal_data(rank, world, hook):
    model, optimizer = build(hook=hook, trigger=EveryNSteps(3))
    for step in range(10):
        train_step(model, optimizer, step, shard=0)
    if hook is not None:
        optimizer.sync_hook.reach_consensus(optimizer)
    return (parameters_of(model),)


# -- what goes wrong while something is under way ---------------------------------------------------------------------


def not_finite(rank, world, hook, bad_rank, at):
    """What each rank raises and when, whether the bad rank has left its bad step out, and what all end with."""
    model, optimizer = build(hook=hook, trigger=EveryNSteps(2))
    unchanged = raised = None
    for step in range(12):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.01 * (step + rank))
        if rank == bad_rank and step == at:
            model.up[1].weight.grad[0, 0] = float("nan")
        before, moves = state_of(optimizer), optimizer.sync_hook._parameters.anchors.moves
        try:
            optimizer.step()
        except ValueError as error:
            raised = step, str(error)
            break
        # An earlier mean may be taken over in the same step.
        if rank == bad_rank and step == at and optimizer.sync_hook._parameters.anchors.moves == moves:
            unchanged = equal(before, state_of(optimizer))
    optimizer.sync_hook.reach_consensus(optimizer, include_state=True)
    finite = all(bool(torch.isfinite(t).all()) for t in state_of(optimizer).values() if torch.is_tensor(t))
    return raised, unchanged, finite, parameters_of(model)


@pytest.mark.parametrize("hook", [HOOKS[0], HOOKS[2], {"momentum": "local", "lag": 1}], ids=str)
@pytest.mark.parametrize("at", [4, 5])
def test_a_bad_gradient_stops_its_replica_at_once_and_the_others_after_the_lag(replicas, hook, at):
    answers = replicas.run(3, not_finite, hook, 1, at)
    steps = {raised[0] for raised, *_ in answers}
    assert len(steps) == 1 and at <= steps.pop() <= at + hook["lag"]
    for raised, _, finite, parameters in answers:
        assert "rank 1: up.1.weight has a gradient that is not finite" in raised[1] and finite
        assert all(torch.equal(a, b) for a, b in zip(parameters, answers[0][-1], strict=True))
    # Nothing is known where the step has raised before it took anything, as where it would have waited for a sync.
    assert answers[1][1] in (True, None)
    if hook == HOOKS[0]:
        assert answers[1][1] == (True if at == 5 else None), "the other step ends a flight"


def bad_last_gradient(rank, world):
    model, optimizer = build(hook=HOOKS[0], trigger=EveryNSteps(2))
    for step in range(5):
        train_step(model, optimizer, step, shard=rank)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("inf") if rank == 0 else 1.0)
    optimizer.step()
    try:
        optimizer.sync_hook.reach_consensus(optimizer)
    except ValueError as error:
        return str(error)


def test_a_bad_gradient_of_the_last_step_is_an_error_of_the_consensus(replicas):
    for message in replicas.run(2, bad_last_gradient):
        assert message is not None and "rank 0" in message and "not finite" in message


def rolled_back_in_flight(rank, world, whose):
    model, optimizer = build(hook=IN_BACKGROUND, trigger=EveryNSteps(4), lr=0.05)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for step in range(9):
        train_step(model, optimizer, step, shard=rank)
    assert optimizer.sync_hook._overlap.under_way(optimizer) == ((9 - 2) % 4 in (1, 2, 3))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    if rank in whose:
        model.load_state_dict(start)
    for step in range(9, 20):
        train_step(model, optimizer, step, shard=rank)
    optimizer.sync_hook.reach_consensus(optimizer)
    loaded = [start[name] for name, _ in model.named_parameters()]
    return parameters_of(model), loaded


def test_a_rollback_in_the_middle_of_a_flight_stays_where_it_is(replicas):
    for parameters, loaded in replicas.run(2, rolled_back_in_flight, [0, 1]):
        torch.testing.assert_close(parameters, loaded, rtol=1e-6, atol=1e-7)


def test_a_rollback_of_one_rank_in_the_middle_of_a_flight_ends_equal_on_all(replicas):
    (parameters, loaded), (others, _) = replicas.run(2, rolled_back_in_flight, [1])
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(parameters, loaded, strict=True))


def not_quantizable(rank, world):
    model, optimizer = build(hook={**IN_BACKGROUND, "lag": 0}, trigger=EveryNSteps(3))
    for step in range(2):
        train_step(model, optimizer, step, shard=rank)
    if rank == 1:
        model.up[0].weight.data[0, 0] = 1e30
    train_step(model, optimizer, 2, shard=rank)
    before, messages = parameters_of(model), []
    for _ in range(3, 6):
        for parameter in model.parameters():
            parameter.grad = None
        try:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            optimizer.step()
        except ValueError as error:
            messages.append(str(error))
    return messages, before, parameters_of(model)


def test_a_number_that_cannot_be_quantized_is_an_error_on_all_ranks_and_leaves_the_parameters(replicas):
    for messages, before, after in replicas.run(2, not_quantizable):
        assert len(messages) == 1 and "rank 1" in messages[0] and "up.0.weight" in messages[0]
        torch.testing.assert_close(after, before)


# -- kinds of tensors -------------------------------------------------------------------------------------------------


class Words(nn.Module):
    """An embedding whose rows seldom move, a running mean, and a counter of its own."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(3000, 8)
        self.linear = nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros(8))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens):
        x = self.embedding(tokens)
        if self.training:
            self.seen.mul_(0.9).add_(0.1 * x.detach().mean(dim=0))
            self.count.add_(len(tokens))
        return self.linear(x).square().mean()


def words(rank, world, dtype, hook):
    torch.manual_seed(0)
    model = Words().to(dtype)
    optimizer = CurvaDion(split_parameters(model), lr=0.02, trigger=EveryNSteps(4))
    sync = ProcessGroupSync(**hook)
    optimizer.register_sync_hook(sync)
    sync.include_module(model)
    generator = torch.Generator().manual_seed(rank)
    sizes = []
    for _ in range(13):
        optimizer.zero_grad()
        model(torch.randint(0, 3000, (6 + rank,), generator=generator)).backward()
        before = sync.bytes_sent
        optimizer.step()
        sizes.append(sync.bytes_sent - before)
    sync.reach_consensus(optimizer)
    return sizes, parameters_of(model), (model.seen.clone(), model.count.clone())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world", [2, 3])
def test_sparse_rows_buffers_and_narrow_parameters_travel_in_the_background(replicas, world, dtype):
    hook = {"wire_format": "sign", "lag": 1, "overlap": 3}
    answers = replicas.run(world, words, dtype, hook)
    at_once = replicas.run(world, words, dtype, {"wire_format": "sign", "lag": 0, "overlap": 0})
    for sizes, parameters, buffers in answers:
        assert all(torch.equal(a, b) for a, b in zip(parameters, answers[0][1], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(buffers, answers[0][2], strict=True))
        # All rows would be 3000 bytes and more; the sync step itself sends the agreement and the questions.
        assert 16 < sizes[3] < 500 and max(sizes) < 2000
    distance = sum((a - b).float().norm() for a, b in zip(answers[0][1], at_once[0][1], strict=True))
    moved = sum((a - b).float().norm() for a, b in zip(at_once[0][1], Words().to(dtype).parameters(), strict=True))
    assert distance < 0.2 * moved
