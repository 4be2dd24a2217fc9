"""Means of quantized tensors over real replicas: the same bits everywhere, and nothing lost."""

import pytest
import torch
from replicas import counted_collectives

from lightning_curvadion.cli.plan.launch_counter import LaunchCounter
from lightning_curvadion.sync import quantization
from lightning_curvadion.sync.collectives import DIRECT_BYTES
from lightning_curvadion.sync.payload_collectives import PayloadCollectives
from lightning_curvadion.sync.payloads import DisplacementPayload, TensorPayload

CODED = [f for f in quantization.WIRE_FORMATS if f != "float32"]
SIZES = [(3, 5), (1000,), (), (129,), (64, 7), (1,)]


def values(rank, shift=0):
    generator = torch.Generator().manual_seed(10 * shift + rank)
    return [torch.randn(size, generator=generator) for size in SIZES]


def averaged(rank, world, chunk):
    """Each format by itself: what came out, the collectives, and what was counted."""
    answers = {}
    for wire_format in quantization.WIRE_FORMATS:
        collectives = PayloadCollectives(chunk=chunk)
        collectives.join()
        tensors = values(rank)
        with counted_collectives() as calls:
            collectives.average([TensorPayload("tensor", tensor, wire_format) for tensor in tensors])
        answers[wire_format] = tensors, list(calls), collectives.bytes_sent
    return answers


@pytest.mark.parametrize(("world", "chunk"), [(1, 10**6), (2, 10**6), (2, 100), (3, 10**6), (4, 300), (5, 400)])
def test_the_mean_is_the_same_bits_on_all_replicas_and_close_to_the_mean(replicas, world, chunk):
    everyone = replicas.run(world, averaged, chunk)
    own = [torch.cat([tensor.reshape(-1) for tensor in values(rank)]) for rank in range(world)]
    largest = max(tensor.norm() for tensor in own)
    errors = {"float32": 1e-6, "bfloat16": 0.01, "int8": 0.02, "int4": 0.3, "int2": 0.8, "sign": 1.2}
    for wire_format in quantization.WIRE_FORMATS:
        error = errors[wire_format]
        answers = [answer[wire_format] for answer in everyone]
        results = [torch.cat([tensor.reshape(-1) for tensor in tensors]) for tensors, *_ in answers]
        assert all(torch.equal(result, results[0]) for result in results)
        assert [tensor.shape for tensor in answers[0][0]] == [torch.Size(size) for size in SIZES]
        assert (results[0] - sum(own) / world).norm() <= error * largest
        numel = len(own[0])
        for _, calls, sent in answers:
            assert sent == sum(size for _, size in calls)
            chunks = -(-numel // chunk)
            assert len(calls) == (1 if wire_format == "float32" or world <= 2 else 2) * chunks
            # Shards are filled up to whole blocks: at most one block for each replica and chunk.
            mean_format = quantization.mean_format_of(wire_format) if world > 2 else wire_format
            padding = world * quantization.quantized_bytes(quantization.block_of(wire_format), mean_format) * chunks
            to_others, mean = (quantization.quantized_bytes(numel, name) for name in (wire_format, mean_format))
            payload = (to_others * (world - 1) + mean) / world
            assert 0.99 * payload <= sent <= payload + 2 * padding
            received = sum((world - 1) * size if name == "all_gather" else size for name, size in calls)
            assert wire_format == "float32" or received <= 2 * (payload + padding)


def moves(rank, world, steps, residual_dtype):
    """Random moves of one parameter for each format, all in one exchange: what arrived, what is kept, and the moves."""
    collectives = PayloadCollectives()
    collectives.join()
    generator = torch.Generator().manual_seed(rank)
    parameters, anchors, residuals, moved = ({f: torch.zeros(40, 10) for f in CODED} for _ in range(4))
    residuals = {f: residual.to(residual_dtype) for f, residual in residuals.items()}
    moved = {f: total.double() for f, total in moved.items()}
    for _ in range(steps):
        for wire_format, parameter in parameters.items():
            before = parameter.clone()
            parameter += torch.randn(40, 10, generator=generator) * 0.01 * (1 + rank)
            moved[wire_format] += parameter.double() - before
        collectives.average([DisplacementPayload(f, parameters[f], anchors[f], f, residuals[f], None) for f in CODED])
    return {f: (parameters[f].double(), residuals[f].double(), moved[f]) for f in CODED}


@pytest.mark.parametrize(("world", "steps"), [(2, 300), (3, 120)])
def test_everything_sent_and_everything_kept_are_all_that_was_moved(replicas, world, steps):
    everyone = replicas.run(world, moves, steps, torch.float32, timeout=180)
    for wire_format in CODED:
        answers = [answer[wire_format] for answer in everyone]
        sent = answers[0][0]
        kept = sum(residual for _, residual, _ in answers) / world
        moved = sum(total for *_, total in answers) / world
        assert all(torch.equal(parameter, sent) for parameter, *_ in answers)
        # So many additions, each rounded by half a unit in the last place of what there is.
        torch.testing.assert_close(sent + kept, moved, rtol=0, atol=steps * 2**-24 * moved.abs().max().item())
        assert (sent - moved).norm() > 100 * (sent + kept - moved).norm() or wire_format == "bfloat16"
        assert kept.norm() < 0.2 * moved.norm(), "what is kept does not grow with the steps"


def test_residuals_of_sixteen_bits_lose_what_their_rounding_loses(replicas):
    everyone = replicas.run(2, moves, 200, torch.bfloat16)
    for wire_format in CODED:
        sent, _, moved = everyone[0][wire_format]
        kept = sum(answer[wire_format][1] for answer in everyone) / 2
        moved = sum(answer[wire_format][2] for answer in everyone) / 2
        assert 1e-6 * moved.norm() < (sent + kept - moved).norm() < 0.02 * moved.norm()


def launches(rank, world):
    """Operators called by one mean in each format: two chunks of so many numbers that all shards are whole blocks."""
    chunk = 3 * 4 * 5 * 128
    collectives = PayloadCollectives(chunk=chunk)
    collectives.join()
    counts = {}
    for wire_format in CODED:
        payload = TensorPayload("tensor", torch.randn(2 * chunk), wire_format)
        with LaunchCounter() as counter:
            collectives.average([payload])
        counts[wire_format] = counter.launches
    return counts


def test_a_mean_launches_as_many_kernels_for_any_number_of_replicas_and_the_host_waits_once(replicas):
    of_three, of_four, of_five = (replicas.run(world, launches)[0] for world in (3, 4, 5))
    assert of_three == of_four == of_five
    for counts in of_three.values():
        assert counts.total() < 300
        assert counts["_local_scalar_dense"] == 1


def tensors_to_broadcast(rank):
    """Of many dtypes, shapes and strides; one of them has other strides on other ranks."""
    generator = torch.Generator().manual_seed(rank)

    def numbers(*shape):
        return torch.randint(-100, 100, shape, generator=generator)

    return [
        numbers(1000).float(),
        numbers(30, 7).double(),
        numbers(7, 30).T if rank == 0 else numbers(30, 7),
        numbers(40, 3)[:, 1].float(),
        numbers(2, 3, 70).float().transpose(0, 2),
        numbers(9, 9).bfloat16(),
        numbers(50) > 0,
        numbers(5).to(torch.int16),
        torch.view_as_complex(numbers(6, 2).float()),
        numbers(3).to(torch.float8_e4m3fn),
        numbers(),
        numbers(10)[::10].float(),
        numbers(0, 4).float(),
        torch.nn.Parameter(numbers(11).float()),
    ]


def broadcast(rank, world, chunk):
    collectives = PayloadCollectives(chunk=chunk)
    collectives.join()
    tensors = tensors_to_broadcast(rank)
    with counted_collectives() as calls:
        collectives.broadcast(tensors)
    expected = tensors_to_broadcast(0)
    same = [torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(tensors, expected, strict=True)]
    return same, list(calls), collectives.bytes_sent, sum(tensor.nbytes for tensor in expected)


@pytest.mark.parametrize(("world", "chunk"), [(2, 1), (3, 60), (2, 10**6)])
def test_a_broadcast_sends_the_bytes_of_any_dtype_once_and_a_chunk_at_a_time(replicas, world, chunk):
    for rank, (same, calls, counted, nbytes) in enumerate(replicas.run(world, broadcast, chunk)):
        assert all(same)
        assert {name for name, _ in calls} == {"broadcast"}
        # A number is never cut, so that a chunk of one float32 may carry a wider one.
        assert max(size for _, size in calls) <= max(4 * chunk, 16)
        assert sum(size for _, size in calls) == counted == (nbytes if rank == 0 else 0)
        assert chunk < nbytes or len(calls) == 1


def mean_of_ones(rank, world):
    collectives = PayloadCollectives()
    collectives.join()
    means = {}
    for wire_format in quantization.BLOCK_FORMATS:
        # Not a whole number of blocks: the last one is filled up with zeros.
        tensor = torch.ones(100)
        collectives.average([TensorPayload("ones", tensor, wire_format)])
        means[wire_format] = tensor.unique().numel()
    return means


@pytest.mark.parametrize("world", [2, 3])
def test_the_zeros_that_fill_up_a_block_do_not_change_the_mean_of_its_numbers(replicas, world):
    for means in replicas.run(world, mean_of_ones):
        assert set(means.values()) == {1}, means


def told(rank, world, directly, numel):
    collectives = PayloadCollectives()
    collectives.join()
    if directly:
        collectives.send_to_each()
    own = torch.tensor([rank, world - rank], dtype=torch.float64).repeat(numel // 2)
    with counted_collectives() as calls:
        largest = collectives.start_all_reduce_max(own.clone(), "a test").read()
        gathered = collectives.all_gather(own)
        differing = collectives.differing({"equal": torch.ones(3), "other": own})
    return largest, gathered.tolist(), list(differing), collectives.bytes_sent, {name for name, _ in calls}


@pytest.mark.parametrize(("world", "numel"), [(1, 2), (2, 2), (3, 2), (3, DIRECT_BYTES // 8 + 2)])
def test_what_all_are_to_know_is_the_same_around_a_ring_and_few_bytes_directly(replicas, world, numel):
    ring, direct = (replicas.run(world, told, directly, numel) for directly in (False, True))
    assert [answer[:4] for answer in ring] == [answer[:4] for answer in direct] == [ring[0][:4]] * world
    largest, gathered, differing, *_ = ring[0]
    assert largest == [world - 1, world] * (numel // 2)
    assert gathered == [[rank, world - rank] * (numel // 2) for rank in range(world)]
    assert differing == (["other"] if world > 1 else [])
    assert all(answer[-1] == {"all_reduce", "all_gather"} for answer in ring)
    # The comparison of two tensors has few bytes in any case.
    few = {"all_to_all_single"}
    assert all(answer[-1] == (few if numel == 2 else {"all_reduce", "all_gather", *few}) for answer in direct)
