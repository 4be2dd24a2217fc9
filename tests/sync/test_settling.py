"""Parameters that were set to something else than a step left in them: the replicas settle them at once, exactly."""

import copy

import pytest
import torch
from models import build, matrix, parameters_of, train_step
from replicas import counted_collectives
from torch import nn
from training import fingerprint, same

from lightning_curvadion import CurvaDion, EveryNSteps, ProcessGroupSync, split_parameters

SIGN = {"wire_format": "sign", "momentum": "local"}


def still(optimizer):
    """From now on steps move nothing, so that what moves is the consensus."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0


def rolled_back(rank, world, hook, whose):
    """The parameters that some ranks load in the middle of a run, and those of this rank at each step after it."""
    model, optimizer = build(hook=hook, trigger=EveryNSteps(2), lr=0.05)
    start = copy.deepcopy(model.state_dict())
    for step in range(7):
        train_step(model, optimizer, step, shard=rank)
    still(optimizer)
    before = [p.detach() + optimizer.state[p].get("residual", 0.0) for p in model.parameters()]
    if rank in whose:
        model.load_state_dict(start)
    after = []
    for step in range(7, 11):
        with counted_collectives() as calls:
            train_step(model, optimizer, step, shard=rank)
        after.append((parameters_of(model), [size for _, size in calls]))
    model.load_state_dict(start)
    return before, parameters_of(model), after


# A mean of three equal numbers in float32 may be rounded.
@pytest.mark.parametrize(("world", "hook"), [(2, SIGN), (3, SIGN), (2, {"wire_format": "int4"}), (2, {})], ids=str)
def test_a_rollback_on_all_ranks_stays_where_it_is(replicas, world, hook):
    for _, start, after in replicas.run(world, rolled_back, hook, range(world)):
        assert all(same(parameters, start) for parameters, _ in after)
        tensors = len(start)
        assert after[0][1][:2] == [16, 16 * tensors], "the digests of what was loaded, and nothing of it"
        assert after[1][1] == after[3][1] == [16], "once"


@pytest.mark.parametrize("hook", [SIGN, {}, {"outer_lr": 0.7}], ids=str)
def test_a_rollback_on_one_rank_meets_the_others_in_the_mean_at_the_next_step(replicas, hook):
    (before, *_, after), (_, start, other_after) = replicas.run(2, rolled_back, hook, [1])
    for (parameters, _), (others, _) in zip(after, other_after, strict=True):
        assert same(parameters, others)
    for parameter, own, loaded in zip(after[0][0], before, start, strict=True):
        torch.testing.assert_close(parameter, (own + loaded) / 2)


def rolled_back_before_validation(rank, world, hook):
    model, optimizer = build(hook={**hook, "momentum": "local"}, trigger=EveryNSteps(2), lr=0.05)
    start = copy.deepcopy(model.state_dict())
    for step in range(3):
        train_step(model, optimizer, step, shard=rank)
    optimizer.sync_hook.reach_consensus(optimizer)
    if rank == 0:
        model.load_state_dict(start)
    own = parameters_of(model)
    optimizer.sync_hook.reach_consensus(optimizer)
    agreed = parameters_of(model)
    with counted_collectives() as calls:
        train_step(model, optimizer, 4, shard=rank)
    return own, agreed, [size for _, size in calls]


@pytest.mark.parametrize("hook", [SIGN, {"outer_lr": 0.7}], ids=str)
def test_a_consensus_after_a_rollback_on_one_rank_is_the_mean(replicas, hook):
    (own, agreed, calls), (other, other_agreed, _) = replicas.run(2, rolled_back_before_validation, hook)
    assert calls[:2] == [16, 3 * 16], "a sync step that compares buffers, and has nothing to settle"
    assert same(agreed, other_agreed) and not same(own, other)
    for mean, mine, others in zip(agreed, own, other, strict=True):
        torch.testing.assert_close(mean, (mine + others) / 2)


def copied_module(rank, world):
    model, optimizer = build(hook=SIGN, trigger=EveryNSteps(2))
    copies = [copy.deepcopy(model), nn.ModuleList([model])]
    copies[0].load_state_dict(model.state_dict())
    with counted_collectives() as calls:
        train_step(model, optimizer, 0, shard=rank)
    del optimizer
    return [size for _, size in calls]


def test_loading_a_copy_of_the_module_is_no_rollback(replicas):
    assert replicas.run(2, copied_module) == [[16], [16]]


def frozen_between_syncs(rank, world, hook):
    """One parameter is frozen between two syncs: what it should meet in, where it rests, and the bytes of the steps."""
    model, optimizer = build(hook=hook, trigger=EveryNSteps(3), lr=0.05)
    for step in range(7):
        train_step(model, optimizer, step, shard=rank)
    frozen = model.up[0].weight
    frozen.requires_grad = False
    own = frozen.detach() + optimizer.state[frozen].get("residual", 0.0)
    sizes, anchors = [], []
    for step in range(7, 16):
        with counted_collectives() as calls:
            train_step(model, optimizer, step, shard=rank)
        sizes.append(sum(size for _, size in calls))
        anchors.append(optimizer.sync_hook.anchor_bytes)
    frozen.grad = None
    at_rest = frozen.detach().clone()
    frozen.requires_grad = True
    for step in range(16, 20):
        train_step(model, optimizer, step, shard=rank)
    optimizer.sync_hook.reach_consensus(optimizer)
    return own, at_rest, (sizes, [anchors[0] - anchors[-1], frozen.nbytes]), fingerprint(model.parameters())


@pytest.mark.parametrize("hook", [SIGN, {"wire_format": "int8", "momentum": "local"}, {}], ids=str)
def test_a_parameter_frozen_between_two_syncs_ends_equal_on_all_replicas(replicas, hook):
    (own, frozen, (sizes, anchors), end), (other, other_frozen, _, other_end) = replicas.run(
        2, frozen_between_syncs, hook
    )
    assert not torch.equal(own, other)
    assert torch.equal(frozen, other_frozen) and end == other_end
    if "wire_format" in hook:
        torch.testing.assert_close(frozen, (own + other) / 2, rtol=1e-4, atol=1e-5)
        assert sizes[7] < sizes[1] < sizes[4], "quantized, then what that left at full width, then nothing"
        assert anchors[0] == anchors[1], "what rests needs no anchor"


def group_added_late(rank, world, hook):
    torch.manual_seed(0)
    first = matrix(24, 16)
    optimizer = CurvaDion([first], lr=0.02, trigger=EveryNSteps(2))
    optimizer.register_sync_hook(ProcessGroupSync(**hook))
    torch.manual_seed(rank)
    late = matrix(16, 24)
    start = late.detach().clone()
    generator = torch.Generator().manual_seed(rank)
    for step in range(7):
        if step == 3:
            optimizer.add_param_group({"params": [late]})
        for parameter in (first, late):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    optimizer.step()
    return start, fingerprint([first, late]), late.detach().clone()


@pytest.mark.parametrize("hook", [SIGN, {}], ids=str)
def test_a_group_added_with_unequal_values_meets(replicas, hook):
    (start, end, late), (other, other_end, _) = replicas.run(2, group_added_late, hook)
    assert not torch.equal(start, other) and end == other_end
    middle = (start + other) / 2
    assert (late - middle).norm() < 0.5 * (start - middle).norm()


def unequal_anchors(rank, world):
    model, optimizer = build(hook=SIGN, trigger=EveryNSteps(2))
    for step in range(3):
        train_step(model, optimizer, step, shard=rank)
    if rank == 1:
        optimizer.sync_hook._parameters.anchors.of(model.up[0].weight).add_(0.1)
    expected = model.up[0].weight.detach() + optimizer.state[model.up[0].weight]["residual"]
    optimizer.sync_hook.reach_consensus(optimizer)
    return expected, model.up[0].weight.detach().clone(), fingerprint(model.parameters())


def test_replicas_whose_anchors_differ_meet_by_value_at_the_next_consensus(replicas):
    (own, agreed, digest), (other, _, other_digest) = replicas.run(2, unequal_anchors)
    assert digest == other_digest
    torch.testing.assert_close(agreed, (own + other) / 2)


def trained_by_turns(rank, world):
    """Two halves of a model in one optimizer, trained by turns: nothing is ever settled, since nothing was replaced."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
    optimizer = CurvaDion(split_parameters(model), lr=0.02, trigger=EveryNSteps(4))
    optimizer.register_sync_hook(ProcessGroupSync())
    generator = torch.Generator().manual_seed(rank)
    sizes = []
    for step in range(12):
        for half, part in enumerate(model):
            part.requires_grad_(half == step % 2)
        optimizer.zero_grad()
        model(torch.randn(8, 8, generator=generator)).square().mean().backward()
        with counted_collectives() as calls:
            optimizer.step()
        sizes.append([size for _, size in calls])
    return sizes, fingerprint(model.parameters())


def test_halves_that_train_by_turns_send_what_they_moved_and_are_not_settled(replicas):
    (sizes, digest), (_, other_digest) = replicas.run(2, trained_by_turns)
    assert digest == other_digest
    assert [len(calls) for calls in sizes] == 3 * [1, 1, 1, 2]
    assert sizes[3] == sizes[7] == sizes[11]


def frozen_and_loaded(rank, world):
    model, optimizer = build(hook=SIGN, trigger=EveryNSteps(4), lr=0.05)
    part = model.up[0]
    start = copy.deepcopy(part.state_dict())
    # Before the first sync step: the parts have moved, and nothing is left of an earlier one.
    for step in range(2):
        train_step(model, optimizer, step, shard=rank)
    part.requires_grad_(False)
    part.load_state_dict(start)
    for parameter in part.parameters():
        parameter.grad = None
    stayed = []
    for step in range(2, 13):
        train_step(model, optimizer, step, shard=rank)
        stayed.append(same(part.parameters(), start.values()))
    return all(stayed)


def test_a_frozen_part_that_was_loaded_stays_as_it_was_loaded(replicas):
    assert replicas.run(2, frozen_and_loaded) == [True, True]
