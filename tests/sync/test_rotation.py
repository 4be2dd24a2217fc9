"""A sync spread over several steps: every parameter travels once, in parts of about one size."""

import copy

import pytest
import torch
from models import build, parameters_of, train_step
from replicas import counted_collectives
from training import fingerprint, same

from lightning_curvadion import EveryNSteps

HOOK = {"wire_format": "int4", "momentum": "local"}


def rotate(rank, world, spread, steps):
    """The bytes of every sync step, which parameters are equal to those of rank 0 after it, and the consensus."""
    model, optimizer = build(layers=6, hook={**HOOK, "spread": spread}, trigger=EveryNSteps(2), lr=0.05)
    history = []
    for step in range(steps):
        with counted_collectives() as calls:
            train_step(model, optimizer, step, shard=rank)
        history.append((optimizer.last_step.synced, calls[-1][1], [fingerprint([p]) for p in parameters_of(model)]))
    settled = [p.detach() + optimizer.state[p]["residual"] for p in model.parameters()]
    optimizer.sync_hook.reach_consensus(optimizer)
    return history, settled, parameters_of(model)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("spread", [2, 4])
def test_every_parameter_travels_once_in_as_many_sync_steps_as_it_is_spread_over(replicas, world, spread):
    answers = replicas.run(world, rotate, spread, 2 * spread)
    whole = replicas.run(world, rotate, 1, 2)[0][0][1][1]
    seen = [0] * len(answers[0][1])
    for synced, *others in zip(*(history for history, _, _ in answers), strict=True):
        steps = [synced, *others]
        assert len({was_synced for was_synced, _, _ in steps}) == 1
        if not steps[0][0]:
            continue
        assert 0.6 * whole / spread < steps[0][1] < 1.6 * whole / spread
        for number, digests in enumerate(zip(*(digests for _, _, digests in steps), strict=True)):
            seen[number] += len(set(digests)) == 1
    assert seen == [1] * len(seen), "equal right after its own sync step, and apart after the others"


def test_a_consensus_of_parts_loses_nothing(replicas):
    (_, settled, agreed), (_, other, other_agreed) = replicas.run(2, rotate, 3, 7)
    assert same(agreed, other_agreed)
    for parameter, mine, others in zip(agreed, settled, other, strict=True):
        torch.testing.assert_close(parameter, (mine + others) / 2, rtol=0, atol=2e-6)


def resumed(rank, world):
    """The parameters of a run that goes on from a consensus, and of one that starts from its checkpoint."""

    def start():
        return build(layers=3, hook={**HOOK, "spread": 3}, trigger=EveryNSteps(2))

    def train(model, optimizer, steps):
        for step in steps:
            train_step(model, optimizer, step, shard=rank)

    model, optimizer = start()
    train(model, optimizer, range(5))
    optimizer.sync_hook.reach_consensus(optimizer, include_state=True)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(5, 11))
    other, other_optimizer = start()
    other.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])
    train(other, other_optimizer, range(5, 11))
    return same(parameters_of(model), parameters_of(other)), saved[1]["trigger"]["sync_steps"]


def test_a_resumed_run_goes_on_with_the_part_whose_turn_it_is(replicas):
    assert replicas.run(2, resumed) == [(True, 2)] * 2
