"""One replica has nobody to synchronise with: with a hook it trains bit for bit as without one."""

import pytest
from models import build, equal, state_of, train_step
from replicas import counted_collectives

from lightning_curvadion import DriftThreshold, EveryNSteps

HOOKS = [
    {"wire_format": "sign", "momentum": "local"},
    {"wire_format": "int4", "momentum": "local", "outer_lr": 0.7, "outer_momentum": 0.6},
    {"wire_format": "int2", "momentum": "average"},
    {"momentum": "factors", "sync_rank_fraction": 0.125},
    {"consensus": "factors"},
    {"consensus": "none"},
    {},
]


def train(rank, world, hook, trigger=None):
    """The state after some steps and a consensus, the collectives of each, and the memory of the anchors."""
    model, optimizer = build(hook=hook, trigger=trigger or EveryNSteps(2), max_local_steps=4)
    sizes = []
    for step in range(5):
        with counted_collectives() as calls:
            train_step(model, optimizer, step, shard=0)
        sizes.append([size for _, size in calls])
    anchors = 0
    if hook is not None:
        with counted_collectives() as calls:
            optimizer.sync_hook.reach_consensus(optimizer, include_state=True)
        sizes.append([size for _, size in calls])
        anchors = optimizer.sync_hook.anchor_bytes
    return state_of(optimizer), sizes, anchors, optimizer.last_step.synced


@pytest.mark.parametrize("hook", HOOKS, ids=str)
def test_one_replica_trains_as_without_a_hook(replicas, hook):
    expected, *_ = train(0, 1, None)
    ((state, sizes, anchors, _),) = replicas.run(1, train, hook)
    assert equal(state, expected)
    assert sizes == [[16]] * 5 + [[]], "the agreement, which carries stop requests, and nothing else"
    assert anchors == 0


def test_one_replica_drifts_from_nobody(replicas):
    expected, *_ = train(0, 1, None, DriftThreshold(1e-6))
    ((state, sizes, anchors, synced),) = replicas.run(1, train, HOOKS[0], DriftThreshold(1e-6))
    assert equal(state, expected)
    assert sizes == [[24]] * 5 + [[]]
    assert anchors == 0
    assert synced, "by max_local_steps"
