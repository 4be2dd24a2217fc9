"""Means of coded tensors over real replicas: the same bits everywhere, and nothing lost."""

import pytest
import torch
from models import build, equal, parameters_of, state_of, train_step
from replicas import counted_collectives

from lightning_curvadion import EveryNSteps, wire
from lightning_curvadion.exchange import Exchange
from lightning_curvadion.parcels import Averaged, Displacement

CODED = [f for f in wire.WIRE_FORMATS if f != "float32"]
SIZES = [(3, 5), (1000,), (), (129,), (64, 7), (1,)]


def values(rank, shift=0):
    generator = torch.Generator().manual_seed(10 * shift + rank)
    return [torch.randn(size, generator=generator) for size in SIZES]


def averaged(rank, world, wire_format, chunk):
    exchange = Exchange(chunk=chunk)
    exchange.join()
    tensors = values(rank)
    with counted_collectives() as calls:
        exchange.average([Averaged("tensor", tensor, wire_format) for tensor in tensors])
    return tensors, list(calls), exchange.bytes_sent


@pytest.mark.parametrize("wire_format", wire.WIRE_FORMATS)
@pytest.mark.parametrize(
    ("world", "chunk"), [(1, 10**6), (2, 10**6), (2, 100), (3, 10**6), (4, 97), (8, 10**6), (8, 400)]
)
def test_the_mean_is_the_same_bits_on_all_replicas_and_close_to_the_mean(replicas, wire_format, world, chunk):
    answers = replicas.run(world, averaged, wire_format, chunk)
    error = {"float32": 1e-6, "bfloat16": 0.01, "int8": 0.02, "int4": 0.3, "int2": 0.8, "sign": 1.2}[wire_format]
    results = [torch.cat([tensor.reshape(-1) for tensor in tensors]) for tensors, *_ in answers]
    own = [torch.cat([tensor.reshape(-1) for tensor in values(rank)]) for rank in range(world)]
    assert all(torch.equal(result, results[0]) for result in results)
    assert [tensor.shape for tensor in answers[0][0]] == [torch.Size(size) for size in SIZES]
    assert (results[0] - sum(own) / world).norm() <= error * max(tensor.norm() for tensor in own)
    total = sum(tensor.numel() for tensor in values(0))
    for _, calls, sent in answers:
        assert sent == sum(size for _, size in calls)
        per_chunk = 1 if wire_format == "float32" or world <= 2 else 2
        assert len(calls) == per_chunk * -(-total // chunk)
        # Shards are filled up to whole blocks: at most one block for each replica and chunk.
        padding = world * wire.encoded_bytes(wire.block_of(wire_format), wire_format) * -(-total // chunk)
        assert wire.encoded_bytes(total, wire_format) <= sent <= wire.encoded_bytes(total, wire_format) + 2 * padding


def moves(rank, world, wire_format, steps, residual_dtype):
    """Random moves of each replica's parameter; what arrived, what is still kept, and what was moved in all."""
    exchange = Exchange()
    exchange.join()
    generator = torch.Generator().manual_seed(rank)
    parameter, anchor, residual = torch.zeros(40, 10), torch.zeros(40, 10), torch.zeros(40, 10, dtype=residual_dtype)
    moved = torch.zeros(40, 10, dtype=torch.float64)
    for _ in range(steps):
        before = parameter.clone()
        parameter += torch.randn(40, 10, generator=generator) * 0.01 * (1 + rank)
        moved += parameter.double() - before
        exchange.average([Displacement("p", parameter, anchor, wire_format, residual, None)])
    return parameter.double(), residual.double(), moved


@pytest.mark.parametrize("wire_format", CODED)
@pytest.mark.parametrize("world", [2, 3])
def test_everything_sent_and_everything_kept_are_all_that_was_moved(replicas, wire_format, world):
    answers = replicas.run(world, moves, wire_format, 1000, torch.float32)
    sent = answers[0][0]
    kept = sum(residual for _, residual, _ in answers) / world
    moved = sum(total for *_, total in answers) / world
    assert all(torch.equal(parameter, sent) for parameter, *_ in answers)
    # A thousand additions round by half a unit in the last place of numbers of about 1 each.
    torch.testing.assert_close(sent + kept, moved, rtol=0, atol=1000 * 2**-24 * moved.abs().max().item())
    assert (sent - moved).norm() > 100 * (sent + kept - moved).norm() or wire_format == "bfloat16"
    assert kept.norm() < 0.2 * moved.norm(), "what is kept does not grow with the steps"


@pytest.mark.parametrize("wire_format", ["int8", "int2"])
def test_residuals_of_sixteen_bits_lose_what_their_rounding_loses(replicas, wire_format):
    answers = replicas.run(2, moves, wire_format, 200, torch.bfloat16)
    sent, moved = answers[0][0], sum(total for *_, total in answers) / 2
    kept = sum(residual for _, residual, _ in answers) / 2
    assert (sent + kept - moved).norm() < 0.02 * moved.norm()


def after_each_step(rank, world, hook, steps):
    model, optimizer = build(hook=hook, trigger=EveryNSteps(2))
    history = []
    for step in range(steps):
        with counted_collectives() as calls:
            train_step(model, optimizer, step, shard=rank)
        history.append((optimizer.last_step, parameters_of(model), list(calls)))
    return history, state_of(optimizer)


MOMENTA = [{"momentum": "factors"}, {"momentum": "dion"}, {"momentum": "average"}, {"momentum": "local"}]
MOMENTA += [{"momentum": "factors", "sync_rank_fraction": 0.125}]


@pytest.mark.parametrize("wire_format", CODED)
@pytest.mark.parametrize("momentum", MOMENTA, ids=str)
@pytest.mark.parametrize("world", [2, 4])
def test_after_every_sync_step_parameters_are_bit_identical_in_every_format(replicas, wire_format, momentum, world):
    histories = [
        history for history, _ in replicas.run(world, after_each_step, {"wire_format": wire_format, **momentum}, 6)
    ]
    for step, (report, reference, _) in enumerate(histories[0]):
        assert report.synced == (step % 2 == 1)
        for other in histories[1:]:
            same = [torch.equal(a, b) for a, b in zip(reference, other[step][1], strict=True)]
            assert all(same) if report.synced else not any(same)
        for history in histories:
            report, _, calls = history[step]
            assert report.bytes_sent == sum(size for _, size in calls)
            assert len(calls) <= 6 if report.synced else [size for _, size in calls] == [16]


@pytest.mark.parametrize("consensus", ["average", "factors", "none"])
def test_two_runs_repeat_bit_for_bit(replicas, consensus):
    hook = {"wire_format": "int2", "consensus": consensus}
    first, second = (replicas.run(3, after_each_step, hook, 6) for _ in range(2))
    for (_, a), (_, b) in zip(first, second, strict=True):
        assert equal(a, b)
