"""Error feedback of parameters: residuals are stored, sent later, flushed and resumed."""

from collections import Counter

import pytest
import torch
from models import build, equal, exact_sync, state_of, train_step
from replicas import counted_collectives
from torch import nn

from lightning_curvadion import CurvaDion, EveryNSteps, ProcessGroupSync
from lightning_curvadion.sync import quantization
from lightning_curvadion.sync.payloads import DisplacementPayload
from lightning_curvadion.sync.settings import has_small_groups

CODED = [f for f in quantization.WIRE_FORMATS if f != "float32"]
SHAPES = {"tall": (40, 24), "wide": (24, 40), "vector": (50,)}


def with_given_gradients(rank, world, hook, steps, settle=True):
    """Train on gradients that do not depend on where the parameters are."""
    start = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=start)) for shape in SHAPES.values()]
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "algorithm": "adamw"}]
    optimizer = CurvaDion(groups, weight_decay=0.0, trigger=EveryNSteps(3))
    optimizer.register_sync_hook(exact_sync(momentum="local", **hook))
    generator = torch.Generator().manual_seed(1 + rank)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    kept = ["residual" in optimizer.state[p] for p in parameters]
    before = [p.detach().clone() for p in parameters]
    optimizer.sync_hook.reach_consensus(optimizer, include_state=settle)
    left = ["residual" in optimizer.state[p] for p in parameters]
    return [p.detach().clone() for p in parameters], before, kept, left


@pytest.mark.parametrize("wire_format", CODED)
@pytest.mark.parametrize(("world", "steps"), [(2, 12), (3, 13)])
def test_settled_parameters_are_those_of_a_run_in_float32(replicas, wire_format, world, steps):
    hook = {"wire_format": wire_format}
    answers = replicas.run(world, with_given_gradients, hook, steps)
    expected = replicas.run(world, with_given_gradients, {}, steps)[0][0]
    for settled, before, kept, left in answers:
        assert all(kept) and not any(left)
        torch.testing.assert_close(settled, expected, rtol=0, atol=2e-6)
        assert all(torch.equal(a, b) for a, b in zip(settled, answers[0][0], strict=True))
        assert not any(torch.allclose(a, b, rtol=0, atol=2e-6) for a, b in zip(before, expected, strict=True))


@pytest.mark.parametrize("steps", [12, 13])
def test_a_consensus_for_validation_flushes_what_one_for_a_checkpoint_flushes(replicas, steps):
    hook = {"wire_format": "int2"}
    saved = replicas.run(2, with_given_gradients, hook, steps, True)
    for (validated, _, kept, left), (expected, *_) in zip(
        replicas.run(2, with_given_gradients, hook, steps, False), saved, strict=True
    ):
        assert all(kept) and not any(left)
        assert all(torch.equal(a, b) for a, b in zip(validated, expected, strict=True))


def frozen_since(rank, world):
    model, optimizer = build(hook={"wire_format": "int2", "momentum": "local"}, trigger=EveryNSteps(2))
    for step in range(4):
        train_step(model, optimizer, step, shard=rank)
    weight = model.up[0].weight
    kept = optimizer.state[weight]["residual"].clone()
    before = weight.detach().clone()
    weight.requires_grad_(False)
    train_step(model, optimizer, 4, shard=rank)
    optimizer.sync_hook.reach_consensus(optimizer, include_state=True)
    return before, kept, weight.detach().clone(), "residual" in optimizer.state[weight]


def test_what_was_kept_of_a_parameter_frozen_since_is_settled_too(replicas):
    answers = replicas.run(2, frozen_since)
    kept = sum(kept for _, kept, *_ in answers) / 2
    for before, _, settled, left in answers:
        assert not left and kept.abs().max() > 0
        torch.testing.assert_close(settled, before + kept, rtol=0, atol=1e-6)


def resumed(rank, world, hook, settle, path):
    """Save right after a sync step, go on, and go on again from what was saved."""
    model, optimizer = build(hook=hook, trigger=EveryNSteps(3))

    def train(steps):
        for step in steps:
            train_step(model, optimizer, step, shard=rank)
        return state_of(optimizer)

    train(range(6))
    if settle:
        optimizer.sync_hook.reach_consensus(optimizer, include_state=True)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"{path}{rank}")
    once = train(range(6, 13))
    saved = torch.load(f"{path}{rank}", weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    residuals = ["residual" in state for state in saved["optimizer"]["state"].values()]
    return equal(once, train(range(6, 13))), residuals


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("wire_format", ["bfloat16", "int2"])
@pytest.mark.parametrize("residual_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("settle", [False, True])
def test_a_resumed_run_is_the_run_bit_for_bit(replicas, world, wire_format, residual_dtype, settle, tmp_path):
    hook = {"wire_format": wire_format, "residual_dtype": residual_dtype, "momentum": "local"}
    if not settle:
        hook["momentum"] = "average"  # the state of one rank is the state of all, residuals apart
    for same, residuals in replicas.run(world, resumed, hook, settle, str(tmp_path / "saved")):
        assert same
        assert not any(residuals) if settle else all(residuals)


def formats_of_groups(rank, world, hook):
    model, optimizer = build(hook=hook, trigger=EveryNSteps(1))
    with counted_collectives() as calls:
        train_step(model, optimizer, 0, shard=rank)
    return calls[-1][1]


@pytest.mark.parametrize(
    ("given", "of_matrices", "of_embeddings", "of_biases"),
    [
        ({"wire_format": "sign", "vector_format": "int4"}, "sign", "int4", "int4"),
        ({"wire_format": "int8", "vector_format": "float32"}, "int8", "float32", "float32"),
        ({"wire_format": "float32", "vector_format": "int8"}, "float32", "int8", "int8"),
        ({"wire_format": "int2"}, "int2", "int8", "int8"),
        ({"wire_format": "bfloat16"}, "bfloat16", "bfloat16", "bfloat16"),
    ],
)
def test_matrices_and_other_parameters_travel_in_formats_of_their_own(
    replicas, given, of_matrices, of_embeddings, of_biases
):
    _, optimizer = build()
    numel: Counter[str] = Counter()
    for group, parameter in optimizer.members():
        others = of_biases if parameter.dim() == 1 else of_embeddings
        numel[of_matrices if group["algorithm"] == "dion" else others] += parameter.numel()
    assert len(numel) == len({of_matrices, of_embeddings, of_biases}), "the model has all three"
    assert has_small_groups(optimizer)
    expected = sum(quantization.quantized_bytes(count, name) for name, count in numel.items())
    running_statistics, flag = 2 * 4 * 16, 1
    hook = {**given, "momentum": "local"}
    assert replicas.run(2, formats_of_groups, hook) == [expected + running_statistics + flag] * 2


def sends_an_embedding(rank, world, rows):
    embedding = nn.Embedding(rows, 64)
    optimizer = CurvaDion([{"params": embedding.parameters(), "algorithm": "adamw"}], trigger=EveryNSteps(1))
    optimizer.register_sync_hook(ProcessGroupSync())
    embedding(torch.arange(rank, rows)).sum().backward()
    with counted_collectives() as calls:
        optimizer.step()
    return calls[-1][1]


@pytest.mark.parametrize(("rows", "wire_format"), [(256, "int8"), (257, "sign")])
def test_by_default_an_embedding_travels_in_int8_where_it_is_small(replicas, rows, wire_format):
    flag = 1
    expected = quantization.quantized_bytes(64 * rows, wire_format) + flag
    assert replicas.run(2, sends_an_embedding, rows) == [expected] * 2


def test_with_formats_of_their_own_parameters_settle_as_in_float32(replicas):
    hook = {"wire_format": "sign", "vector_format": "int4"}
    expected = replicas.run(2, with_given_gradients, {}, 13)[0][0]
    for settled, *_ in replicas.run(2, with_given_gradients, hook, 13):
        torch.testing.assert_close(settled, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_momenta_are_corrected_by_the_displacement_without_the_residual(dtype):
    # What quantization left over, from earlier syncs or from this one, is no record of the steps since the last one.
    anchor, residual, mean = (
        torch.tensor([1.0, 2.0, 3.0]),
        torch.tensor([8.0, 8.0, 8.0]),
        torch.tensor([0.5, 0.25, 0.0]),
    )
    parameter, differences = nn.Parameter((anchor + 0.25).to(dtype)), []
    payload = DisplacementPayload(
        "p",
        parameter,
        anchor,
        "sign",
        residual,
        None,
        correct_momenta=lambda: differences.append(payload.difference.clone()),
    )
    payload.write(0, 2, mean[:2], error=torch.full((2,), 4.0))
    payload.write(2, 3, mean[2:], error=torch.full((1,), 4.0))
    payload.finish()
    assert len(differences) == 1
    torch.testing.assert_close(differences[0].float(), torch.tensor([0.25, 0.0, -0.25]))
    torch.testing.assert_close(parameter.detach().float(), torch.tensor([1.5, 2.25, 3.0]))
