"""Digests tell tensors of other bits, or of the same in another order, apart."""

import itertools

import pytest
import torch
from replicas import counted_collectives

from lightning_curvadion.sync.collectives import Collectives
from lightning_curvadion.sync.digests import digest

LARGE = 2**20 + 3


@pytest.mark.parametrize("numel", [1, 2, 7, 1000, LARGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.bool])
def test_any_other_bit_gives_another_digest(dtype, numel):
    tensor = torch.arange(numel).remainder(2).to(dtype)
    expected = digest(tensor)
    assert torch.equal(digest(tensor.clone()), expected)
    for place in {0, numel // 2, numel - 1}:
        other = tensor.clone()
        other[place] = 1 - other[place].to(torch.int8)
        assert not torch.equal(digest(other), expected)


def test_the_order_of_elements_counts_within_a_part_and_between_parts():
    small = [torch.tensor(values) for values in itertools.permutations([0, 1, 2, 4])]
    # With weights for the places, and nothing else, [2, 0] would be [0, 1].
    small += [torch.tensor([2, 0, 0, 0]), torch.tensor([0, 1, 0, 0])]
    assert len({int(digest(tensor)) for tensor in small}) == len(small)
    large = torch.randn(2 * 2**20)
    assert not torch.equal(digest(large), digest(large.roll(2**20)))


def test_strides_do_not_count():
    tensor = torch.randn(5, 7)
    assert torch.equal(digest(tensor.T.contiguous().T), digest(tensor))
    assert torch.equal(digest(torch.cat([torch.zeros(1), tensor[0]])[1:]), digest(tensor[0]))


def differing(rank, world):
    collectives = Collectives()
    collectives.join()
    tensors = {"equal": torch.ones(3), "own": torch.full((3,), float(rank)), "last": torch.tensor(rank == world - 1)}
    with counted_collectives() as calls:
        names = list(collectives.differing(tensors))
    return names, list(calls)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_what_differs_on_any_replica_is_known_to_all_for_sixteen_bytes_a_tensor(replicas, world):
    expected = (["own", "last"], [("all_reduce", 48)]) if world > 1 else ([], [])
    assert replicas.run(world, differing) == [expected] * world
