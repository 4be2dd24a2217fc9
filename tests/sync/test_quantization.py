"""Coding: sizes, exactness, errors; and what it does to the factors of a momentum."""

import math

import pytest
import torch

from lightning_curvadion.cli.plan.launch_counter import LaunchCounter
from lightning_curvadion.optim import dion
from lightning_curvadion.sync import quantization

INTEGERS = list(quantization.BLOCK_FORMATS)
CODED = ["bfloat16", *INTEGERS]
BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4, "int2": 2, "sign": 1}


def there_and_back(tensor, wire_format):
    return quantization.dequantize(quantization.quantize(tensor, wire_format), wire_format, tensor.numel())


@pytest.mark.parametrize("wire_format", quantization.WIRE_FORMATS)
@pytest.mark.parametrize("numel", [0, 1, 2, 7, 63, 64, 65, 127, 128, 129, 1000, 2**17 + 1, 3 * 2**17])
def test_sizes(wire_format, numel):
    tensor = torch.randn(numel)
    payload = quantization.quantize(tensor, wire_format)
    block = quantization.block_of(wire_format)
    blocks = math.ceil(numel / block)
    steps = 2 * blocks if block > 1 else 0
    assert payload.dtype == torch.uint8
    assert payload.shape == (blocks * block * BITS[wire_format] // 8 + steps,)
    assert payload.numel() == quantization.quantized_bytes(numel, wire_format)
    decoded = quantization.dequantize(payload, wire_format, numel)
    assert decoded.shape == (numel,) and decoded.dtype == torch.float32


@pytest.mark.parametrize(
    ("wire_format", "error"), [("float32", 0), ("bfloat16", 0.002), ("int8", 0.007), ("int4", 0.11), ("int2", 0.35)]
)
def test_error_of_normal_numbers(wire_format, error):
    tensor = torch.randn(300, 100, generator=torch.Generator().manual_seed(0))
    assert (there_and_back(tensor, wire_format) - tensor.view(-1)).norm() <= error * tensor.norm()


def test_a_sign_is_the_sign_and_the_mean_size():
    tensor = torch.randn(4 * 128, generator=torch.Generator().manual_seed(0))
    decoded = there_and_back(tensor, "sign").view(4, 128)
    blocks = tensor.view(4, 128)
    torch.testing.assert_close(decoded.abs(), blocks.abs().mean(1, keepdim=True).expand(4, 128), rtol=2**-8, atol=0)
    assert torch.equal(decoded > 0, blocks > 0)


@pytest.mark.parametrize(("wire_format", "levels"), [("int8", 255), ("int4", 15), ("int2", 4), ("sign", 2)])
def test_a_block_uses_every_level_it_pays_for(wire_format, levels):
    block = quantization.block_of(wire_format)
    tensor = torch.linspace(-1, 1, 64 * block)[torch.randperm(64 * block, generator=torch.Generator().manual_seed(0))]
    tensor.view(64, block)[:, 0], tensor.view(64, block)[:, 1] = 1, -1
    decoded = there_and_back(tensor, wire_format).view(64, block)
    steps = decoded.abs().amax(1, keepdim=True)
    assert len((decoded / steps).mul(1000).round().unique()) == levels


@pytest.mark.parametrize("wire_format", ["bfloat16", "int8", "int4", "sign"])
def test_coding_what_was_coded_changes_nothing(wire_format):
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        once = there_and_back(torch.randn(1000, generator=generator) * torch.logspace(-9, 9, 1000), wire_format)
        assert torch.equal(there_and_back(once, wire_format), once)


@pytest.mark.parametrize("wire_format", quantization.WIRE_FORMATS)
def test_zeros_stay_zero(wire_format):
    tensor = torch.randn(1000)
    tensor[128:512] = 0
    decoded = there_and_back(tensor, wire_format)
    assert (decoded[128:512] == 0).all() and (decoded[:128] != 0).any()


@pytest.mark.parametrize("wire_format", INTEGERS)
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-38, 1e-20, 1e18])
def test_very_small_and_very_large_numbers_stay_finite(wire_format, size):
    decoded = there_and_back(torch.full((300,), size), wire_format)
    assert torch.isfinite(decoded).all() and (decoded <= 2 * size).all()


@pytest.mark.parametrize("wire_format", quantization.WIRE_FORMATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 63, 64, 299])
def test_a_number_that_is_not_finite_is_refused_by_name(wire_format, bad, position):
    tensor = torch.randn(3, 100)
    tensor.view(-1)[position] = bad
    with pytest.raises(ValueError, match=r"layer\.weight holds NaN.* cannot be quantized"):
        quantization.quantize(tensor, wire_format, name="layer.weight")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_layouts(dtype):
    tensor = torch.randn(32, 40).to(dtype).T
    expected = there_and_back(tensor.float().contiguous(), "int8")
    assert torch.equal(there_and_back(tensor, "int8"), expected)


@pytest.mark.parametrize("wire_format", quantization.WIRE_FORMATS)
@pytest.mark.parametrize("numel", [3 * 256, 3 * 256 - 1, 600, 128, 100])
def test_rows_are_quantized_like_one_tensor(wire_format, numel):
    tensor = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    rows = torch.nn.functional.pad(tensor, (0, 3 * 256 - numel)).view(3, 256)
    packed = quantization.quantize_rows(rows, wire_format, numel)
    assert packed.shape == (3, quantization.quantized_bytes(256, wire_format))
    restored = quantization.dequantize_rows(packed, wire_format, torch.empty(3, 256)).view(-1)
    assert torch.equal(restored[:numel], there_and_back(tensor, wire_format))


def test_zeros_that_fill_up_a_block_do_not_make_its_step_smaller():
    for wire_format in CODED:
        assert torch.equal(
            there_and_back(torch.ones(100), wire_format), there_and_back(torch.ones(128), wire_format)[:100]
        )


@pytest.mark.parametrize("wire_format", INTEGERS)
def test_five_hundred_rows_launch_as_many_kernels_as_two(wire_format):
    counts = []
    for rows in (2, 512):
        numbers = torch.empty(rows, 256, device="meta")
        with LaunchCounter() as counter:
            packed = quantization.quantize_rows(numbers, wire_format, numbers.numel() - 100)
            quantization.dequantize_rows(packed, wire_format, numbers)
        counts.append(counter.launches)
    assert counts[0] == counts[1] and 0 < counts[0].total() < 70


# -- factors in few bits ----------------------------------------------------------------------------------------------


def momentum_like(m=96, n=64):
    """A matrix whose singular values fall like those of a momentum in training: fast at first, then slowly."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(k, n, generator=generator)).Q for k in (m, n))
    return (left * torch.arange(1, n + 1) ** -1.0) @ right.mT


def coded(factor, wire_format):
    return there_and_back(factor.mT.contiguous(), wire_format).view_as(factor.mT).mT


# Largest angle (sine) between the subspaces that P spans, and relative error of the step P Q^T, with factors coded.
CLOSENESS = {"bfloat16": (0.01, 0.01), "int8": (0.04, 0.03), "int4": (0.7, 0.4)}


@pytest.mark.parametrize("wire_format", CLOSENESS)
def test_down_to_four_bits_the_step_stays_close(wire_format):
    B = momentum_like().unsqueeze(0)
    Q = dion.initial_right_factor(64, 16, 0, B).unsqueeze(0)
    for _ in range(5):
        Q = dion.unit_columns(dion.right_factor(B, dion.orthonormalize(dion.left_factor(B, Q))), Q, 1e-8)[0]
    steps, spaces = [], []
    for form in ("float32", wire_format):
        P = dion.orthonormalize(coded(dion.left_factor(B, Q)[0], form).unsqueeze(0))
        R = coded(dion.right_factor(B, P)[0], form).unsqueeze(0)
        spaces.append(P[0])
        steps.append((P @ dion.unit_columns(R, Q, 1e-8)[0].mT)[0])
    sine = torch.linalg.matrix_norm(spaces[1] - spaces[0] @ (spaces[0].mT @ spaces[1]), 2).item()
    error = ((steps[1] - steps[0]).norm() / steps[0].norm()).item()
    print(f"{wire_format}: sine {sine:.4f}, step {error:.4f}")
    assert (sine, error) <= CLOSENESS[wire_format] and error <= CLOSENESS[wire_format][1]


@pytest.mark.gpu
@pytest.mark.parametrize("wire_format", CODED)
def test_a_gpu_codes_like_a_cpu(wire_format):
    tensor = torch.randn(100_003)
    coded = quantization.quantize(tensor.cuda(), wire_format)
    decoded = quantization.dequantize(coded, wire_format, tensor.numel())
    torch.testing.assert_close(decoded.cpu(), there_and_back(tensor, wire_format), rtol=2**-7, atol=0.02)
    assert torch.equal(quantization.dequantize(coded.cpu(), wire_format, tensor.numel()), decoded.cpu())
