"""ProcessGroupSync as a hook: attaching it, and several optimizers."""

import pytest
import torch
import torch.distributed as dist
from models import build, exact_sync, parameters_of, train_step
from replicas import counted_collectives

from lightning_curvadion import EveryNSteps, ProcessGroupSync


def start(rank, world, seeds):
    model, optimizer = build(seed=seeds[rank])
    if seeds[rank] > 0:
        model.batch_norm.running_mean.fill_(1.0)
    with counted_collectives() as calls:
        sync = exact_sync()
        optimizer.register_sync_hook(sync)
        sync.include_module(model)
    return parameters_of(model), [b.clone() for b in model.buffers()], list(calls), sync.bytes_sent


@pytest.mark.parametrize("world", [1, 2, 3])
def test_all_replicas_start_from_rank_zeros_values(replicas, world):
    answers = replicas.run(world, start, range(world))
    model = build(seed=0)[0]
    expected = parameters_of(model)
    for parameters, buffers, calls, _ in answers:
        assert all(torch.equal(a, b) for a, b in zip(parameters, expected, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
        assert [name for name, _ in calls].count("all_gather") == 2, "one check for the optimizer, one for the module"


def test_what_is_equal_already_is_not_sent_when_a_hook_attaches(replicas):
    model, optimizer = build()
    optimizer.init_state()
    # Two digests of the model and of the settings, then those of each parameter, its state, and each buffer.
    steps = 1
    state = sum(isinstance(value, torch.Tensor) for own in optimizer.state.values() for value in own.values()) + steps
    tensors = len(list(model.parameters())) + state + len(list(model.buffers()))
    compared = 2 * 32 + 16 * tensors
    # Random numbers of the seed: a norm and biases that start at ones or zeros are equal too.
    random = [p for p in model.parameters() if p.unique().numel() > 1]
    sent = 4 * (sum(p.numel() for p in random) + 16)
    for seeds, expected in (([0, 0], 0), ([0, 1], sent)):
        answers = replicas.run(2, start, seeds)
        assert [counted for *_, counted in answers] == [compared + expected, compared]
        assert sum(size for name, size in answers[0][2] if name == "broadcast") == expected


def test_a_user_sees_what_a_user_calls():
    calls = {"include_module", "note_other_values", "reach_consensus", "average", "measure_drift", "regroup"}
    reads = {"settings", "agreement", "rank", "world_size", "bytes_sent", "drift", "global_step"}
    of_the_plan = {"settings_for", "anchor_bytes"}
    of_membership = {"optimizers", "recovery", "resume_triggers", "take_from_rank_0"}
    seen = {name for name in dir(ProcessGroupSync()) if name[0] != "_"}
    assert seen == calls | reads | of_the_plan | of_membership


def second_hook(rank, world):
    _, optimizer = build(hook={})
    with pytest.raises(ValueError, match="already"):
        optimizer.register_sync_hook(exact_sync())


def test_a_second_hook(replicas):
    replicas.run(1, second_hook)


def test_a_hook_without_a_process_group():
    with pytest.raises(ValueError, match="init_process_group"):
        build(hook={})


def gan(rank, world):
    generator, first = build(trigger=EveryNSteps(2))
    critic, second = build(layers=1, trigger=EveryNSteps(3))
    sync = exact_sync()
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


def attached_late(rank, world):
    """Step counts and residuals after a hook attached to optimizers that had stepped alone, unequally often."""
    model, optimizer = build()
    for step in range(1 + rank):
        train_step(model, optimizer, step, rank)
    for parameter in model.parameters():
        optimizer.state[parameter]["residual"] = torch.ones_like(parameter)
    optimizer.register_sync_hook(exact_sync(wire_format="int8", momentum="local"))
    states = optimizer.state.values()
    return {state["step"] for state in states if "step" in state}, any("residual" in state for state in states)


def test_a_hook_that_attaches_late_starts_from_rank_zeros_steps_and_no_residuals(replicas):
    assert replicas.run(2, attached_late) == [({1}, False)] * 2


def in_a_subgroup(rank, world):
    if rank == 0:
        dist.new_group([0], use_local_synchronization=True)
    group = dist.new_group([0, 1])
    if rank == 2:
        return None
    hook = ProcessGroupSync(group, lag=3, overlap=2, momentum="local")
    model, optimizer = build(trigger=EveryNSteps(2))
    optimizer.register_sync_hook(hook)
    for step in range(6):
        train_step(model, optimizer, step, shard=rank)
    hook.reach_consensus(optimizer)
    return parameters_of(model)


def test_ranks_of_a_subgroup_may_have_made_different_numbers_of_groups(replicas):
    first, second, third = replicas.run(3, in_a_subgroup)
    assert third is None and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
