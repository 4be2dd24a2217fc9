"""ProcessGroupSync as a hook: attaching it, and several optimizers."""

import pytest
import torch
from models import build, parameters_of, train_step
from replicas import counted_collectives

from lightning_curvadion import EveryNSteps, ProcessGroupSync


def start(rank, world):
    model, optimizer = build(seed=rank)
    with counted_collectives() as calls:
        sync = ProcessGroupSync()
        optimizer.register_sync_hook(sync)
        sync.include_module(model)
    return parameters_of(model), [b.clone() for b in model.buffers()], [name for name, _ in calls]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_all_replicas_start_from_rank_zeros_values(replicas, world):
    answers = replicas.run(world, start)
    expected = parameters_of(build(seed=0)[0])
    for parameters, buffers, names in answers:
        assert all(torch.equal(a, b) for a, b in zip(parameters, expected, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(buffers, answers[0][1], strict=True))
        assert names.count("all_gather") == 2, "one check for the optimizer, one for the module"


def second_hook(rank, world):
    _, optimizer = build(hook={})
    with pytest.raises(ValueError, match="already"):
        optimizer.register_sync_hook(ProcessGroupSync())


def test_a_second_hook(replicas):
    replicas.run(1, second_hook)


def test_a_hook_without_a_process_group():
    with pytest.raises(ValueError, match="init_process_group"):
        build(hook={})


def gan(rank, world):
    generator, first = build(trigger=EveryNSteps(2))
    critic, second = build(layers=1, trigger=EveryNSteps(3))
    sync = ProcessGroupSync()
    for optimizer in (first, second):
        optimizer.register_sync_hook(sync)
    for step in range(6):
        train_step(generator, first, step, rank)
        train_step(critic, second, step, rank)
    sync.reach_consensus([first, second])
    return parameters_of(generator) + parameters_of(critic)


def test_one_hook_serves_two_optimizers(replicas):
    a, b = replicas.run(2, gan)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
