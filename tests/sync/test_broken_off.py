"""A mean that breaks off between two chunks leaves parameters that can be saved."""

from unittest import mock

import pytest
import torch
from models import build, parameters_of, train_step

from lightning_curvadion import EveryNSteps
from lightning_curvadion.sync.errors import ReplicaLostError
from lightning_curvadion.sync.payload_collectives import PayloadCollectives
from lightning_curvadion.sync.sync_step import SyncStep

HOOKS = [
    {"wire_format": "sign", "momentum": "displacement", "chunk": 700},
    {"wire_format": "float32", "momentum": "displacement", "chunk": 700},
    {"wire_format": "int8", "momentum": "local", "outer_momentum": 0.5, "chunk": 700},
    {"wire_format": "float32", "momentum": "local", "chunk": 700},
]


def around_a_sync_step(rank, hook, chunks):
    """Parameters before the mean of a sync step and after it, which breaks off after some of its chunks."""
    model, optimizer = build(hook=hook, trigger=EveryNSteps(3))
    mean_right, mean_of_chunk = SyncStep.mean_right, PayloadCollectives.mean_of_chunk
    before, formed = [], []

    def recorded(sync_step, *arguments):
        before.append(parameters_of(model))
        formed.clear()
        return mean_right(sync_step, *arguments)

    def broken_off(collectives, *arguments, **options):
        formed.append(arguments)
        if before and len(formed) > chunks:
            raise ReplicaLostError("lost")
        return mean_of_chunk(collectives, *arguments, **options)

    with (
        mock.patch.object(SyncStep, "mean_right", recorded),
        mock.patch.object(PayloadCollectives, "mean_of_chunk", broken_off),
    ):
        try:
            for step in range(3):
                train_step(model, optimizer, step, shard=rank)
        except ReplicaLostError:
            return before[0], parameters_of(model), True
        return before[0], parameters_of(model), False


def ends(rank, world, hook):
    return around_a_sync_step(rank, hook, chunks=2), around_a_sync_step(rank, hook, chunks=1000)


@pytest.mark.parametrize("hook", HOOKS)
def test_every_number_is_the_replicas_own_or_the_mean(replicas, hook):
    for (own, left, lost), (same_own, mean, lost_too) in replicas.run(2, ends, hook):
        assert lost and not lost_too
        kept = taken = 0
        for before, again, after, end in zip(own, same_own, left, mean, strict=True):
            assert torch.equal(before, again)
            assert bool(((after == before) | (after == end)).all())
            kept += int((after != end).sum())
            taken += int((after != before).sum())
        assert kept > 100 and taken > 100
