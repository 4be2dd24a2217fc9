"""Module buffers take part in a consensus where they have changed, whoever replaced them."""

import torch
from models import build, train_step
from replicas import counted_collectives

from lightning_curvadion import EveryNSteps


def consensus_of_buffers(rank, world):
    """What a consensus sends after a step, after a forward pass, and when a callback has put another tensor there."""
    model, optimizer = build(hook={}, trigger=EveryNSteps(10**6), max_local_steps=None)
    sync = optimizer.sync_hook

    def reach():
        with counted_collectives() as calls:
            sync.reach_consensus(optimizer)
        return sum(size for _, size in calls), model.batch_norm.running_mean.clone()

    train_step(model, optimizer, 0, shard=rank)
    answers = [reach(), reach()]
    model(torch.full((8,), rank))
    sync.expect_other_buffers()
    answers.append(reach())
    model.batch_norm.running_mean = torch.full_like(model.batch_norm.running_mean, float(rank))
    sync.expect_other_buffers()
    answers.append(reach())
    return answers


def test_buffers_are_sent_after_they_may_have_changed_and_then_once(replicas):
    first, second = replicas.run(2, consensus_of_buffers)
    # Running mean and variance, and a 64-bit counter as eight small numbers.
    buffers = 4 * (16 + 16) + 4 * 8
    assert [sent for sent, _ in first[1:]] == [0, buffers, buffers] and first[0][0] > buffers
    for (_, a), (_, b) in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[1][1], first[2][1])
    torch.testing.assert_close(first[3][1], torch.full((16,), 0.5))
