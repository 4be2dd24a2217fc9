"""Module buffers take part in a consensus where they have changed, whoever replaced them."""

import pytest
import torch
from models import build, train_step
from replicas import counted_collectives
from torch import nn

from lightning_curvadion import CurvaDion, EveryNSteps, ProcessGroupSync


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
    # Running mean and variance, and a 64-bit counter.
    buffers = 4 * (16 + 16) + 8
    assert [sent for sent, _ in first[1:]] == [0, buffers, buffers] and first[0][0] > buffers
    for (_, a), (_, b) in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[1][1], first[2][1])
    torch.testing.assert_close(first[3][1], torch.full((16,), 0.5))


BUFFERS = {
    "counter": torch.arange(50),
    "short": torch.arange(6, dtype=torch.int16).view(2, 3).T,
    "mask": torch.tensor([True, False, False]),
    "codes": torch.tensor([1.0, 2.0, 3.0]).to(torch.float8_e4m3fn),
    "spectrum": torch.tensor([[1 + 2j, 3j], [4.0, 5.0]]).T,
    "narrow": torch.tensor([1.0, 2.0], dtype=torch.float16),
}
MEANS = ("spectrum", "narrow")


def own_buffers(rank):
    """Each replica's, all different."""
    return {
        name: buffer.logical_xor(torch.tensor(bool(rank % 2)))
        if buffer.dtype == torch.bool
        else (buffer.to(torch.complex64 if buffer.is_complex() else torch.float32) * (1 + 2 * rank)).to(buffer.dtype)
        for name, buffer in BUFFERS.items()
    }


def synchronized_buffers(rank, world, in_a_step):
    """Buffers of many dtypes after a sync step, or a consensus outside of one; and what was sent."""
    model = nn.Linear(4, 4)
    for name, buffer in BUFFERS.items():
        model.register_buffer(name, buffer.clone())
    optimizer = CurvaDion([{"params": list(model.parameters()), "algorithm": "lion"}], trigger=EveryNSteps(1))
    optimizer.register_sync_hook(ProcessGroupSync(momentum="local"))
    optimizer.sync_hook.include_module(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for name, buffer in own_buffers(rank).items():
        getattr(model, name).copy_(buffer)
    optimizer.sync_hook.expect_other_buffers()
    counted_before = optimizer.sync_hook.bytes_sent
    with counted_collectives() as calls:
        optimizer.step() if in_a_step else optimizer.sync_hook.reach_consensus(optimizer)
    counted = optimizer.sync_hook.bytes_sent - counted_before
    return {name: getattr(model, name) for name in BUFFERS}, list(calls), counted


@pytest.mark.parametrize("in_a_step", [True, False])
@pytest.mark.parametrize("world", [2, 3])
def test_a_buffer_becomes_its_mean_or_where_it_has_none_the_one_of_rank_0_at_the_cost_of_its_bytes(
    replicas, world, in_a_step
):
    own = [own_buffers(rank) for rank in range(world)]
    for rank, (buffers, calls, counted) in enumerate(replicas.run(world, synchronized_buffers, in_a_step)):
        for name, buffer in buffers.items():
            if name in MEANS:
                wide = torch.complex64 if buffer.is_complex() else torch.float32
                expected = (sum(values[name].to(wide) for values in own) / world).to(buffer.dtype)
                torch.testing.assert_close(buffer, expected)
            else:
                assert torch.equal(buffer, own[0][name]), name
        agreement = [16] if in_a_step else []
        mean = 4 * (4 * 4 + 4 + 2 * 4 + 2)
        from_rank_0 = 8 * 50 + 2 * 6 + 3 + 3 if rank == 0 else 0
        assert [size for _, size in calls] == [*agreement, mean, from_rank_0]
        assert counted == sum(agreement) + mean + from_rank_0
