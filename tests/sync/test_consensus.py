"""Consensus outside of a sync step: exact, sent once, and forgotten when a state is loaded."""

import copy

import pytest
import torch
from models import build, equal, parameters_of, state_of, train_step
from replicas import counted_collectives

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
