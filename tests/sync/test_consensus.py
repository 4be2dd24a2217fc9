"""Consensus outside of a sync step: exact, sent once, and forgotten when a state is loaded."""

import copy

import pytest
import torch
from models import build, equal, exact_sync, parameters_of, state_of, train_step
from replicas import counted_collectives
from training import same

from lightning_curvadion import EveryNSteps

NEVER = EveryNSteps(10**6)


def consensus(rank, world, hook, include_state):
    model, optimizer = build(hook=hook, trigger=NEVER, max_local_steps=None)
    for step in range(3):
        train_step(model, optimizer, step, shard=rank)
    own = state_of(optimizer), [b.clone() for b in model.buffers()]
    with counted_collectives() as calls:
        optimizer.sync_hook.reach_consensus([optimizer], include_state)
    sent = sum(size for _, size in calls)
    with counted_collectives() as again:
        optimizer.sync_hook.reach_consensus([optimizer], include_state)
    return own, (state_of(optimizer), [b.clone() for b in model.buffers()]), sent, list(again)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    "hook", [{}, {"consensus": "factors"}, {"consensus": "none"}, {"wire_format": "bfloat16"}], ids=str
)
@pytest.mark.parametrize("include_state", [False, True])
def test_reaching_consensus_is_the_exact_mean_whatever_the_settings(replicas, world, hook, include_state):
    answers = replicas.run(world, consensus, hook, include_state)
    for key in answers[0][0][0]:
        values = [own[0][key] for own, *_ in answers]
        results = [met[0][key] for _, met, *_ in answers]
        is_parameter = not key.endswith((".momentum", ".Q", ".norm", ".exp_avg", ".exp_avg_sq", ".step"))
        if not (is_parameter or include_state):
            continue
        assert all(torch.equal(torch.as_tensor(r), torch.as_tensor(results[0])) for r in results)
        if key.endswith(".step"):
            assert results[0] == values[0]
        elif key.endswith(".norm"):
            momenta = [own[0][key.replace(".norm", ".momentum")] for own, *_ in answers]
            fallen = sum(momenta).norm() / sum(momentum.norm() for momentum in momenta)
            torch.testing.assert_close(results[0], fallen * sum(values) / world)
        else:
            torch.testing.assert_close(results[0], sum(v / world for v in values), rtol=1e-5, atol=1e-6)
    for number, buffer in enumerate(answers[0][1][1]):
        values = [own[1][number] for own, *_ in answers]
        assert all(torch.equal(met[1][number], buffer) for _, met, *_ in answers)
        if buffer.is_floating_point():
            assert not torch.equal(values[0], values[1])
            torch.testing.assert_close(buffer, sum(values) / world)
        else:
            assert torch.equal(buffer, values[0])
    # Three buffers, the anchors, and how far the consensus is.
    digests = ("all_reduce", 5 * 16)
    assert all(again == [digests] for *_, again in answers), "nothing has moved since: nothing but digests to send"


def rewind(rank, world, hook):
    model, optimizer = build(hook=hook, trigger=EveryNSteps(2))

    def train(steps):
        for step in steps:
            train_step(model, optimizer, step, shard=rank)
        return parameters_of(model)

    train(range(3))
    optimizer.sync_hook.reach_consensus(optimizer, include_state=True)
    model_state, optimizer_state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    once = train(range(3, 8))
    model.load_state_dict(model_state)
    optimizer.load_state_dict(optimizer_state)
    again = train(range(3, 8))
    return all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("hook", [{"wire_format": "bfloat16"}, {"outer_lr": 0.7, "outer_momentum": 0.9}], ids=str)
def test_loading_a_state_into_a_running_optimizer_forgets_where_it_was(replicas, hook):
    assert replicas.run(2, rewind, hook) == [True, True]


def train_around_consensus(rank, world, hook, inference):
    """The state after training on from a consensus before the first step, and from one between two sync steps."""
    model, optimizer = build(hook=hook, trigger=EveryNSteps(2))
    for step in range(4):
        if step in (0, 3):
            with torch.inference_mode(inference):
                optimizer.sync_hook.reach_consensus(optimizer, include_state=True)
        train_step(model, optimizer, step, shard=rank)
    return state_of(optimizer)


@pytest.mark.parametrize("hook", [{}, {"wire_format": "int4", "outer_lr": 0.7, "outer_momentum": 0.6}], ids=str)
def test_a_consensus_in_inference_mode_leaves_state_that_trains_on(replicas, hook):
    expected = replicas.run(2, train_around_consensus, hook, False)
    for state, other in zip(replicas.run(2, train_around_consensus, hook, True), expected, strict=True):
        assert equal(state, other)


def resumed(rank, world, hook, options, dtype):
    """Whether a run that goes on from a consensus of its state ends where one ends that starts from its checkpoint."""

    def start():
        model, optimizer = build(**options, trigger=EveryNSteps(3))
        model.to(dtype)
        optimizer.register_sync_hook(exact_sync(**hook))
        return model, optimizer

    def train(model, optimizer, steps):
        for step in steps:
            train_step(model, optimizer, step, shard=rank)
        return parameters_of(model)

    model, optimizer = start()
    train(model, optimizer, range(5))
    optimizer.sync_hook.reach_consensus(optimizer, include_state=True)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = train(model, optimizer, range(5, 12))
    other, other_optimizer = start()
    other.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])
    return same(train(other, other_optimizer, range(5, 12)), expected)


@pytest.mark.parametrize(
    ("hook", "options", "dtype"),
    [
        ({"wire_format": "sign", "momentum": "local"}, {}, torch.bfloat16),
        ({"outer_lr": 0.7, "outer_momentum": 0.6, "momentum": "local"}, {}, torch.bfloat16),
        ({}, {"rank_fraction": 1.0}, torch.float32),
    ],
    ids=str,
)
def test_a_run_that_goes_on_from_a_consensus_of_its_state_is_the_one_that_resumes_from_it(
    replicas, hook, options, dtype
):
    assert replicas.run(2, resumed, hook, options, dtype) == [True, True]


def flushed(rank, world):
    model, optimizer = build(
        hook={"wire_format": "int2", "momentum": "local", "outer_lr": 0.5}, trigger=EveryNSteps(2), lr=0.05
    )
    for step in range(2):
        train_step(model, optimizer, step, shard=rank)
    settled = [p.detach() + optimizer.state[p]["residual"] for p in model.parameters()]
    optimizer.sync_hook.reach_consensus(optimizer)
    return settled, parameters_of(model)


def test_residuals_that_a_consensus_flushes_after_a_sync_step_take_no_second_outer_step(replicas):
    (own, agreed), (other, _) = replicas.run(2, flushed)
    for parameter, mine, others in zip(agreed, own, other, strict=True):
        torch.testing.assert_close(parameter, (mine + others) / 2, rtol=0, atol=2e-6)
