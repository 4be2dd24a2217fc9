"""Overlap: a mean in the background loses nothing, whatever happens while it is under way."""

import random

import pytest
import torch
from models import build, exact_sync, matrix, parameters_of, state_of, train_step
from replicas import counted_collectives
from torch import nn

from lightning_curvadion import CurvaDion, EveryNSteps, IntegratedRMMC, ProcessGroupSync, split_parameters


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
    moved = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in parameters]
    # A step of the optimizer, without what a mean adds to it.
    from lightning_curvadion.optim import local_step as steps

    own_step = steps.step_vector_groups

    def watched(*args, **kwargs):
        own_step(*args, **kwargs)
        for total, parameter, before in zip(moved, parameters, starts, strict=True):
            total += (parameter.detach() - before).double()

    steps.step_vector_groups = watched
    try:
        for _ in range(choice.randrange(5, 25)):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            starts = parameters_of(nn.ParameterList(parameters))
            optimizer.step()
            if choice.random() < 0.1:
                optimizer.sync_hook.reach_consensus(optimizer, include_state=choice.random() < 0.5)
    finally:
        steps.step_vector_groups = own_step
    optimizer.sync_hook.reach_consensus(optimizer)
    return [parameter.detach().double() for parameter in parameters], moved


def schedules(rank, world, seeds):
    return [schedule(rank, world, seed) for seed in seeds]


@pytest.mark.parametrize("world", [2, 3])
def test_the_consensus_is_the_start_and_the_mean_of_all_moves_over_random_schedules(replicas, world):
    everyone = replicas.run(world, schedules, range(30), timeout=120)
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
        for under_way, synced, same_branches, differing in replicas.run(world, saved_in_flight, hook, saved_after, path):
            assert synced and same_branches and not differing
            in_flight.append(under_way)
    assert any(in_flight) == (hook["overlap"] > 0)
