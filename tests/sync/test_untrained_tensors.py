"""Buffers, and parameters that no optimizer trains, are sent where they differ between replicas, and nowhere else."""

import copy

import pytest
import torch
from models import build, exact_sync, train_step
from replicas import counted_collectives
from torch import nn
from training import fingerprint

from lightning_curvadion import CurvaDion, EveryNSteps, split_parameters


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
    answers.append(reach())
    model.batch_norm.running_mean = torch.full_like(model.batch_norm.running_mean, float(rank))
    answers.append(reach())
    return answers


def test_buffers_are_sent_where_they_differ_and_then_once(replicas):
    first, second = replicas.run(2, consensus_of_buffers)
    # The digests of three buffers, of the anchors and of how far a consensus is; and the running mean. The counter of
    # batches is equal on all replicas, and so is the variance of a batch of one token.
    digests, mean = 5 * 16, 4 * 16
    assert [sent for sent, _ in first[1:]] == [digests, digests + mean, digests + mean]
    assert first[0][0] > digests + 2 * mean
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
    optimizer.register_sync_hook(exact_sync(momentum="local"))
    optimizer.sync_hook.include_module(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for name, buffer in own_buffers(rank).items():
        getattr(model, name).copy_(buffer)
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
        # 16 bytes for each thing that is compared; outside of a step also for the anchors and how far a consensus is.
        compared = [16, 16 * len(BUFFERS)] if in_a_step else [16 * (len(BUFFERS) + 2)]
        mean = 4 * (4 * 4 + 4 + 2 * 4 + 2)
        from_rank_0 = 8 * 50 + 2 * 6 + 3 + 3 if rank == 0 else 0
        assert [size for _, size in calls] == [*compared, mean, from_rank_0]
        assert counted == sum(compared) + mean + from_rank_0


class Constants(nn.Module):
    """Tables that never change: a causal mask, a rotary table and a counter, 40 times the size of the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("mask", torch.ones(64, 64, dtype=torch.bool).tril())
        self.register_buffer("rotary", torch.randn(64, 16))
        self.register_buffer("positions", torch.arange(500))
        # Never saved, and so never shared.
        self.register_buffer("cache", torch.zeros(3), persistent=False)


def bytes_of_constants(rank, world):
    torch.manual_seed(0)
    model = Constants()
    optimizer = CurvaDion(split_parameters(model), trigger=EveryNSteps(1))
    optimizer.register_sync_hook(exact_sync(momentum="local"))
    optimizer.sync_hook.include_module(model)
    sizes = []
    for step in range(2):
        model.linear(torch.randn(4, 16, generator=torch.Generator().manual_seed(2 * step + rank))).sum().backward()
        model.cache.fill_(rank)
        with counted_collectives() as calls:
            optimizer.step()
        sizes.append([size for _, size in calls])
    return sizes


def test_constant_buffers_are_never_sent(replicas):
    for sizes in replicas.run(2, bytes_of_constants):
        assert sizes == 2 * [[16, 3 * 16, 4 * (16 * 16 + 16)]]


class Student(nn.Module):
    """A student, its EMA teacher and a target network that is copied now and then, both outside the optimizer or frozen
    in it."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher, self.target = (nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)) for _ in range(3))
        self.follow(0.0)
        self.copy()

    def follow(self, decay: float) -> None:
        for teacher, student in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            teacher.requires_grad = False
            # The idiom of published code: it leaves no trace in the tensor's version counter.
            teacher.data = teacher.data * decay + student.data * (1 - decay)

    def copy(self) -> None:
        self.target.requires_grad_(False).load_state_dict(self.student.state_dict())


def distance(one, other):
    one, other = (torch.cat([p.detach().flatten() for p in module.parameters()]) for module in (one, other))
    return float((one - other).norm() / other.norm())


def train_student(rank, world, hook, everything):
    torch.manual_seed(0)
    model = Student()
    optimizer = CurvaDion(
        split_parameters(model if everything else model.student), lr=0.05, trigger=EveryNSteps(4), max_local_steps=None
    )
    optimizer.register_sync_hook(exact_sync(momentum="local", **hook))
    optimizer.sync_hook.include_module(model)
    generator = torch.Generator().manual_seed(rank)
    models = []
    for step in range(16):
        data = torch.randn(16, 8, generator=generator)
        optimizer.zero_grad()
        (model.student(data) - model.teacher(data) - data.roll(1, 1)).square().mean().backward()
        optimizer.step()
        model.follow(0.9)
        if step % 8 == 4:
            model.copy()
        if step in (10, 14):
            models.append(copy.deepcopy(model))
    optimizer.step()
    models.append(copy.deepcopy(model))
    model.follow(0.9)
    optimizer.sync_hook.reach_consensus(optimizer)
    return [*models, model]


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("wire_format", ["float32", "bfloat16", "sign"])
def test_teachers_and_target_networks_are_equal_after_a_consensus(replicas, wire_format, everything):
    models, others = replicas.run(2, train_student, {"wire_format": wire_format}, everything)
    (local, last, synced, agreed), (_, other_last, other_synced, other_agreed) = models, others
    for part in ("student", "teacher", "target"):
        assert fingerprint(getattr(agreed, part).parameters()) == fingerprint(getattr(other_agreed, part).parameters())
    assert distance(agreed.teacher, local.teacher) > 0 and distance(agreed.target, agreed.student) > 0
    apart = {
        part: distance(getattr(last, part), getattr(other_last, part)) for part in ("student", "teacher", "target")
    }
    if wire_format == "sign":
        # Left alone by sync steps, and no farther apart than what they follow was before a sync step.
        assert 0 < apart["teacher"] < apart["student"] and 0 < apart["target"] < apart["student"]
    else:
        assert fingerprint(synced.teacher.parameters()) == fingerprint(other_synced.teacher.parameters())
