"""A trigger and a wire format of a user's own, as the guide shows them."""

import pytest
import torch
from guide import names_defined_in
from models import build, parameters_of, train_step
from replicas import counted_collectives
from training import same

from lightning_curvadion import CurvaDionStrategy, ProcessGroupSync, WireFormat, register_wire_format
from lightning_curvadion.sync import quantization


@pytest.fixture(autouse=True)
def _registers_nothing(monkeypatch):
    monkeypatch.setattr(quantization, "_REGISTERED", {})


def train_as_the_guide(rank, world):
    """Parameters after a sync step, the steps that synchronised, the residual, and what travelled."""
    names_defined_in("A wire format")
    trigger = names_defined_in("A trigger")["DenseFirst"](2, 3)
    hook = {"wire_format": "ternary", "momentum": None}
    model, optimizer = build(hook=hook, trigger=trigger)
    synced, sizes = [], []
    for step in range(7):
        with counted_collectives() as calls:
            train_step(model, optimizer, step, rank)
        synced.append(optimizer.last_step.synced)
        sizes.append(sum(size for _, size in calls))
        if step == 5:
            after_sync = parameters_of(model)
    weight = model.up[0].weight
    saved = optimizer.state_dict()["trigger"]
    return after_sync, synced, optimizer.state[weight]["residual"].norm().item(), sizes, saved


@pytest.mark.parametrize("world", [2, 3])
def test_the_trigger_and_the_wire_format_of_the_guide_train(replicas, world):
    answers = replicas.run(world, train_as_the_guide)
    numbers = sum(p.numel() for p in build()[0].parameters())
    for parameters, synced, residual, sizes, saved in answers:
        assert synced == [True, True, True, False, False, True, False]
        assert same(parameters, answers[0][0]), "after a sync step"
        assert residual > 0, "what three levels lose is sent later"
        # A sixteenth of float32, and more where a shard fills up blocks. The few numbers outside matrices take a byte,
        # and buffers travel at full width.
        assert sizes[3] == 16 and sizes[5] < 4 * numbers / 6
        assert saved["trigger"]["steps"] == 7


def test_a_format_of_ones_own_restores_what_it_can_say():
    names_defined_in("A wire format")
    said = torch.tensor([1.0, 0.0, -1.0, 0.0, 1.0, 0.0]).repeat(320) * 0.75
    restored = quantization.dequantize(quantization.quantize(said, "ternary"), "ternary", said.numel())
    torch.testing.assert_close(restored, 0.75 * said, rtol=2**-7, atol=0)
    assert quantization.quantized_bytes(1920, "ternary") == 6 * 66
    assert CurvaDionStrategy(wire_format="ternary").sync.settings.wire_format == "ternary"


class Broken(WireFormat):
    block, block_bytes = 4, 4

    def quantize_rows(self, numbers, numel):
        return numbers.sign().to(torch.int8).view(torch.uint8)

    def dequantize_rows(self, packed, out):
        return out


def test_a_format_that_does_not_do_what_it_should_is_refused():
    with pytest.raises(ValueError, match="dequantize_rows of the wire format 'broken' must write all of out"):
        register_wire_format("broken", Broken())
    broken = Broken()
    broken.block_bytes = 1
    with pytest.raises(ValueError, match=r"must return uint8 of shape \(rows, bytes\), here \(2, 2\), not"):
        register_wire_format("broken", broken)
    with pytest.raises(ValueError, match="the wire format 'int8' exists already"):
        register_wire_format("int8", Broken())
    with pytest.raises(ValueError, match=r"wire_format must be one of 'float32', .*, not 'broken'"):
        ProcessGroupSync(wire_format="broken")


@pytest.mark.parametrize(
    ("wire_format", "matrix", "vector"),
    [("float32", 1, 1), ("bfloat16", 1, 1), ("int8", 1, 1), ("int4", 1, 1), ("int2", 0.8, 0), ("sign", 0.3, 0),
     ("ternary", 0.3, 0)],
)  # fmt: skip
def test_few_bits_correct_the_momentum_less(wire_format, matrix, vector):
    names_defined_in("A wire format")
    settings = CurvaDionStrategy(wire_format=wire_format).sync.settings
    assert settings.correction_share(wire_format, matrix=True) == matrix
    assert settings.correction_share(wire_format, matrix=False) == vector
