"""Rows of a large embedding that have not moved cost one bit, receive nothing, and lose nothing."""

import math

import pytest
import torch
from models import exact_sync
from replicas import counted_collectives
from torch import nn

from lightning_curvadion import CurvaDion, EveryNSteps
from lightning_curvadion.sync.payloads import FEWEST_ROWS
from lightning_curvadion.sync.quantization import WIRE_FORMATS, mean_format_of, quantized_bytes
from lightning_curvadion.sync.sparse_rows import far_rows, row_distances

ROWS, COLUMNS = FEWEST_ROWS + 7, 20
QUANTIZED = [name for name in WIRE_FORMATS if name not in ("float32", "bfloat16")]
# Rows that a replica moves: one that only it does, and one of all.
EVERYONES = 500


def embedding(**hook):
    """An embedding, and the optimizer that trains it with a sync at every third step."""
    start = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(ROWS, COLUMNS, generator=start))
    optimizer = CurvaDion(
        [{"params": [weight], "algorithm": "adamw"}], lr=0.01, weight_decay=0.0, trigger=EveryNSteps(3)
    )
    optimizer.register_sync_hook(exact_sync(momentum="local", **hook))
    return weight, optimizer


def step(weight, optimizer, rows, generator):
    weight.grad = torch.zeros_like(weight)
    weight.grad[rows] = torch.randn(len(rows), COLUMNS, generator=generator)
    optimizer.step()


def moves_few_rows(rank, world, hook):
    """Bytes of a sync step, the embedding before and after it, and what another replica's row received."""
    weight, optimizer = embedding(**hook)
    before = weight.detach().clone()
    generator = torch.Generator().manual_seed(1 + rank)
    for _ in range(3):
        with counted_collectives() as calls:
            step(weight, optimizer, [rank, EVERYONES], generator)
    return calls, before, weight.detach().clone()


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("wire_format", QUANTIZED)
def test_only_rows_that_some_replica_moved_travel(replicas, world, wire_format):
    answers = replicas.run(world, moves_few_rows, {"wire_format": wire_format})
    moved = sorted([*range(world), EVERYONES])
    mask = -(-ROWS // 8)
    for calls, before, after in answers:
        changed = (before != after).any(dim=1).nonzero().view(-1).tolist()
        assert changed == moved, "each replica's row reached the others, and no other row changed"
        assert torch.equal(after, answers[0][2])
        names = [name for name, _ in calls]
        assert names[:2] == ["all_reduce", "all_gather"] and calls[1][1] == mask
        sent = sum(size for _, size in calls[2:])
        numel = len(moved) * COLUMNS
        flag_and_shards = 300
        assert sent <= quantized_bytes(numel, wire_format) + quantized_bytes(numel, mean_format_of(wire_format)) + (
            flag_and_shards
        )


@pytest.mark.parametrize("hook", [{"wire_format": "float32"}, {"wire_format": "int4", "outer_lr": 0.7}])
def test_all_rows_travel_at_full_width_and_where_an_outer_step_moves_them(replicas, hook):
    for calls, _, _ in replicas.run(2, moves_few_rows, hook):
        assert calls[-1][1] >= quantized_bytes(ROWS * COLUMNS, hook["wire_format"])


def walks_over_many_rows(rank, world, hook):
    """Every row moves now and then. The embedding after the last sync step, and the consensus."""
    weight, optimizer = embedding(**hook)
    generator = torch.Generator().manual_seed(1 + rank)
    for _ in range(24):
        rows = torch.randint(0, ROWS, (150,), generator=generator).unique()
        step(weight, optimizer, rows.tolist(), generator)
    settled = weight.detach().clone()
    optimizer.sync_hook.reach_consensus(optimizer)
    return settled, weight.detach().clone()


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("wire_format", ["int8", "sign"])
@pytest.mark.parametrize("chunk", [2**24, 333])
def test_rows_at_rest_lose_nothing(replicas, world, wire_format, chunk):
    answers = replicas.run(world, walks_over_many_rows, {"wire_format": wire_format, "chunk": chunk})
    expected = replicas.run(world, walks_over_many_rows, {"wire_format": "float32"})[0][1]
    for after_sync, consensus in answers:
        assert torch.equal(after_sync, answers[0][0]), "the same bits on all replicas after a sync step"
        torch.testing.assert_close(consensus, expected, rtol=0, atol=3e-6)
        assert torch.equal(consensus, answers[0][1])


def creeps(rank, world):
    """Where a row is after each of three sync steps, before which it moves by about 1 % of what the farthest does."""
    weight, optimizer = embedding(wire_format="int8")
    start, places = weight.detach().clone(), []
    for _ in range(3):
        with torch.no_grad():
            weight[0] += 1.0
            weight[5] += 0.0055 * (rank + 1.5)
        for _ in range(3):
            weight.grad = torch.zeros_like(weight)
            optimizer.step()
        places.append((weight - start)[5].clone())
    return places


def test_a_row_that_moves_little_waits_until_it_has_moved_enough(replicas):
    for places in replicas.run(2, creeps):
        assert [bool(place.any()) for place in places] == [False, False, True]
        torch.testing.assert_close(places[-1], torch.full((COLUMNS,), 3 * 0.0055 * 2), rtol=0.15, atol=0)


def diverges(rank, world):
    weight, optimizer = embedding(wire_format="sign")
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        step(weight, optimizer, [1], generator)
    if rank == 1:
        with torch.no_grad():
            weight[77, 3] = math.nan
    before = weight.detach().clone()
    with pytest.raises(ValueError, match=r"rank 1: displacement of .* holds NaN"):
        step(weight, optimizer, [1], generator)
    return torch.equal(before[2:77], weight[2:77])


def test_a_row_that_diverged_is_an_error_on_all_replicas(replicas):
    assert replicas.run(2, diverges) == [True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_moved_where_it_or_its_residual_is_not_small_beside_the_farthest(dtype):
    anchor = torch.zeros(5, 3)
    parameter, residual = anchor.clone().to(dtype), anchor.clone()
    assert not far_rows(row_distances(parameter, anchor, residual)).any(), "nothing has moved"
    parameter[0, 0], parameter[1, 1], residual[2, 2], parameter[3, 0] = 1.0, 0.01, -0.5, math.nan
    assert far_rows(row_distances(parameter, anchor, residual)).tolist() == [True, True, True, True, False], (
        "NaN may be far"
    )
    parameter[3, 0] = 0.0
    assert far_rows(row_distances(parameter, anchor, residual)).tolist() == [True, False, True, False, False]
