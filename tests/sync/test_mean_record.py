"""Anchors that move by recorded means alone have the bits of those that took part in the means."""

import queue

import pytest
import torch
from models import Net, train_step
from torch import nn

from lightning_curvadion import CurvaDion, EveryNSteps, ProcessGroupSync, split_parameters
from lightning_curvadion.sync.mean_record import MeanRecorder, Record, replay

HOOKS = [{}, {"wire_format": "int4", "overlap": 2, "chunk": 700}, {"spread": 2}, {"vector_format": "int8", "lag": 0}]


class ManyTokens(Net):
    """Of which few occur."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1100, 16)


def records_of(recorder):
    while True:
        try:
            yield recorder.take(0.0)
        except queue.Empty:
            return


def follow(rank, world, hook):
    model = ManyTokens()
    optimizer = CurvaDion(split_parameters(model), trigger=EveryNSteps(2))
    optimizer.register_sync_hook(sync := ProcessGroupSync(**hook))
    sync.include_module(model)
    for step in range(3):
        train_step(model, optimizer, step, shard=rank)
    anchors, parameters = sync._parameters.anchors, [p for _, p in optimizer.named_parameters()]
    copies = [anchors.of(p).clone() for p in parameters]
    anchors.recorder = recorder = MeanRecorder({p: number for number, p in enumerate(parameters)}, 2**24)
    for step in range(3, 12):
        train_step(model, optimizer, step, shard=rank)
    sync.reach_consensus(optimizer, include_state=True)
    for step in range(12, 16):
        train_step(model, optimizer, step, shard=rank)
    records = list(records_of(recorder))
    assert len(records) == recorder.count > 4
    moved = [not torch.equal(copy, anchors.of(p)) for copy, p in zip(copies, parameters, strict=True)]
    for record in records:
        replay(record, copies)
    assert all(moved)
    return [torch.equal(copy, anchors.of(p)) for copy, p in zip(copies, parameters, strict=True)]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("hook", HOOKS)
def test_replayed_means_give_the_same_anchors(replicas, world, hook):
    assert all(all(equal) for equal in replicas.run(world, follow, hook))


def test_more_than_a_copy_is_not_kept():
    recorder = MeanRecorder({}, most_bytes=100)
    for _ in range(5):
        recorder.note([], torch.zeros(1, 64, dtype=torch.uint8), "sign", shards=True)
    assert recorder.closed and recorder.count == 2 and recorder.take(0.0) is None


@pytest.mark.parametrize("header", [b"{}", b'{"slices": [[7, 0, 1, -1]], "format": "gzip", "shards": true, "rows": 1}'])
def test_what_is_no_mean_is_refused(header):
    with pytest.raises((ValueError, KeyError)):
        replay(Record(header, torch.zeros(18, dtype=torch.uint8)), [])
