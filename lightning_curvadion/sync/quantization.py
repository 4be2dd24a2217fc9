r"""Wire formats: block-wise quantization of tensors, as pure functions.

A quantized tensor is one flat tensor of bytes. The integer formats cut the numbers into blocks of consecutive elements.
Each block has a step s, one bfloat16. A number x becomes the level

.. math:: u = \mathrm{trunc}(x / s + c + 1/2), \qquad \hat x = s\,(u - c),

clamped to the levels that its bits offer. A byte holds several levels:

===========  ====  =====  ========  ==================  ==================================================
format       bits  block  centre c  step s              bits a number, steps included (float32: 32)
===========  ====  =====  ========  ==================  ==================================================
``int8``     8     128    128       largest / 127       8.125 (1 / 3.9)
``int4``     4     64     8         largest / 7         4.25  (1 / 7.5)
``int2``     2     64     3/2       0.9957 rms          2.25  (1 / 14.2)
``sign``     1     128    1/2       2 mean of \|x\|     1.125 (1 / 28.4)
===========  ====  =====  ========  ==================  ==================================================

A step from the largest number clips nothing. At 2 bits it would put nearly every number on the two inner levels, so
``int2`` takes the step with the least error for a normal distribution (Max, 1960, "Quantizing for minimum
distortion"). At 1 bit the mean of \|x\| has the least error for any distribution. Half the block would lower the error
of ``int2`` by 4 % for 11 % more bytes; twice the block would raise it by 5 % for 6 % fewer
(``examples/benchmarks/quantization.py --blocks``).

A block whose step is no normal bfloat16 (numbers below about 1e-38, with ``int2`` about 1e-22) is quantized to zero.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

WireFormat = Literal["float32", "bfloat16", "int8", "int4", "int2", "sign"]
WIRE_FORMATS = get_args(WireFormat)

# Formats that store numbers as they are. float64 is for tensors that must not be rounded; it is no user's choice.
_PLAIN = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
# On a CPU so many numbers at a time: the temporaries then stay in its cache.
_CPU_BATCH = 2**17


@dataclass(frozen=True)
class BlockFormat:
    """An integer format.

    Attributes:
        bits: Bits a number.
        block: Elements that share a step.
        centre: Level of the number zero.
        step: The step of each row of a tensor of shape (blocks, elements).
        mean_format: Format of the mean over more than two replicas, where it is another one.
    """

    bits: int
    block: int
    centre: float
    step: Callable[[Tensor], Tensor]
    mean_format: str | None = None

    @property
    def clips(self) -> bool:
        """Whether numbers can lie beyond the outermost level."""
        return self.bits < 4


def _of_largest(levels: int) -> Callable[[Tensor], Tensor]:
    # Rounded to bfloat16, by up to 1/256 of itself: 127 levels become 126.504 to 127.496, so that the largest number
    # takes the outermost level whichever way the step was rounded, and quantizing twice changes nothing.
    return lambda blocks: blocks.abs().amax(dim=1).div_(levels)


BLOCK_FORMATS = {
    "int8": BlockFormat(8, 128, 128.0, _of_largest(127)),
    "int4": BlockFormat(4, 64, 8.0, _of_largest(7)),
    "int2": BlockFormat(
        2, 64, 1.5, lambda blocks: torch.linalg.vector_norm(blocks, dim=1).mul_(0.9957 / math.sqrt(blocks.shape[1]))
    ),
    # A mean of signs is no sign: quantized to one bit again, it cost four replicas 0.03 of the loss.
    "sign": BlockFormat(1, 128, 0.5, lambda blocks: blocks.abs().mean(dim=1).mul_(2.0), mean_format="int2"),
}


def block_of(wire_format: str) -> int:
    """Elements that share a step; 1 for the formats without blocks.

    Example:
        >>> block_of("int2"), block_of("bfloat16")
        (64, 1)
    """
    return BLOCK_FORMATS[wire_format].block if wire_format in BLOCK_FORMATS else 1


def mean_format_of(wire_format: str) -> str:
    """The format in which the mean of quantized numbers travels between more than two replicas.

    Example:
        >>> mean_format_of("int4"), mean_format_of("sign")
        ('int4', 'int2')
    """
    block_format = BLOCK_FORMATS.get(wire_format)
    return (block_format.mean_format if block_format is not None else None) or wire_format


def quantized_bytes(numel: int, wire_format: str) -> int:
    """Bytes of ``numel`` quantized numbers, with the steps of their blocks.

    Example:
        >>> [quantized_bytes(1_000_000, wire_format) for wire_format in ("float32", "int8", "sign")]
        [4000000, 1015626, 140626]
    """
    if wire_format in _PLAIN:
        return numel * _PLAIN[wire_format].itemsize
    block_format = BLOCK_FORMATS[wire_format]
    return -(-numel * block_format.bits // 8) + 2 * -(-numel // block_format.block)


def quantize(tensor: Tensor, wire_format: str, name: str = "tensor") -> Tensor:
    """Quantize a tensor.

    Args:
        tensor: Floating-point, of any shape.
        wire_format: One of ``WIRE_FORMATS``.
        name: What to call the tensor in an error.

    Returns:
        uint8, shape ``(quantized_bytes(tensor.numel(), wire_format),)``: the levels, then the steps.

    Raises:
        ValueError: A number is NaN or infinite, or too large for the format.

    Example:
        >>> packed = quantize(torch.tensor([0.5, -1.0, 0.25]), "int8")
        >>> dequantize(packed, "int8", 3)
        tensor([ 0.5039, -0.9999,  0.2520])
    """
    packed = quantize_unchecked(tensor, wire_format)
    if tensor.numel() and not bool(torch.isfinite(dequantize(packed, wire_format, tensor.numel())).all()):
        raise ValueError(not_quantizable(name))
    return packed


def not_quantizable(name: str) -> str:
    """The error message for a tensor that holds NaN, infinite or far too large numbers."""
    return (
        f"Lower the learning rate, or skip the batch at which training diverged: {name} holds NaN, infinite or far too"
        " large numbers and cannot be quantized"
    )


def quantize_unchecked(tensor: Tensor, wire_format: str) -> Tensor:
    """:func:`quantize` without the check: a NaN or an infinity makes its whole block NaN or infinite."""
    flat = tensor.reshape(-1)
    if wire_format in _PLAIN:
        return flat.to(_PLAIN[wire_format]).contiguous().view(torch.uint8)
    flat = flat.to(torch.float32)
    packed = torch.empty(quantized_bytes(flat.numel(), wire_format), dtype=torch.uint8, device=flat.device)
    block_format = BLOCK_FORMATS[wire_format]
    steps = torch.empty(-(-flat.numel() // block_format.block), dtype=torch.bfloat16, device=flat.device)
    for blocks, levels, rows in _batches(flat, packed, block_format):
        _quantize_blocks(blocks, block_format, levels, steps[rows])
    packed[packed.numel() - steps.nbytes :] = steps.view(torch.uint8)
    return packed


def dequantize(packed: Tensor, wire_format: str, numel: int, out: Tensor | None = None) -> Tensor:
    """The numbers of a quantized tensor, shape ``(numel,)``: float32, or float64 with ``"float64"``.

    Args:
        packed: What :func:`quantize` returned.
        wire_format: The same as there.
        numel: How many numbers were quantized.
        out: Contiguous tensor of the result's shape and dtype to write to.
    """
    if wire_format in _PLAIN:
        # Bytes are copied, not viewed: numbers must start at a multiple of their size.
        numbers = torch.empty(numel, dtype=_PLAIN[wire_format], device=packed.device)
        numbers.view(torch.uint8).copy_(packed)
        if out is not None:
            return out.copy_(numbers)
        return numbers.float() if wire_format == "bfloat16" else numbers
    numbers = torch.empty(numel, dtype=torch.float32, device=packed.device) if out is None else out
    block_format = BLOCK_FORMATS[wire_format]
    count = -(-numel // block_format.block)
    steps = packed[packed.numel() - 2 * count :].clone().view(torch.bfloat16).float()
    for blocks, levels, rows in _batches(numbers, packed, block_format):
        _dequantize_blocks(levels, steps[rows], block_format, blocks)
    return numbers


def _batches(flat: Tensor, packed: Tensor, block_format: BlockFormat) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Batches of blocks: views of their numbers (rows, elements) and levels (rows, bytes), and the rows themselves."""
    whole, rest = divmod(flat.numel(), block_format.block)
    levels = packed[: -(-flat.numel() * block_format.bits // 8)]
    width = block_format.block * block_format.bits // 8
    split = whole * width
    many, many_levels = flat[: flat.numel() - rest].view(whole, block_format.block), levels[:split].view(whole, width)
    at_a_time = max(1, _CPU_BATCH // block_format.block) if flat.device.type == "cpu" else max(1, whole)
    for start in range(0, whole, at_a_time):
        rows = slice(start, min(start + at_a_time, whole))
        yield many[rows], many_levels[rows], rows
    if rest:
        yield flat[flat.numel() - rest :].unsqueeze(0), levels[split:].unsqueeze(0), slice(whole, whole + 1)


def _quantize_blocks(blocks: Tensor, block_format: BlockFormat, levels: Tensor, steps: Tensor) -> None:
    step = block_format.step(blocks).to(torch.bfloat16)
    # A step too small to be divided by means zero. NaN compares as false, and so stays.
    step = torch.where(step < torch.finfo(torch.bfloat16).tiny, 0.0, step)
    steps.copy_(step)
    inverse = torch.where(step == 0, 0.0, step.float().reciprocal())
    scaled = torch.mul(blocks, inverse.unsqueeze(1)).add_(block_format.centre + 0.5)
    if block_format.clips:
        scaled.clamp_(0, 2**block_format.bits - 0.5)
    if block_format.bits == 8:
        levels.copy_(scaled)
        return
    # The k-th share of a byte comes from the k-th part of the block: neighbours stay neighbours, which is fast, as is
    # adding the shares as floating-point numbers, of which a byte is exactly one.
    shares = 8 // block_format.bits
    if scaled.shape[1] % shares:
        scaled = torch.nn.functional.pad(scaled, (0, -scaled.shape[1] % shares))
    parts = scaled.floor_().view(len(blocks), shares, -1)
    byte = torch.add(parts[:, 0], parts[:, 1], alpha=2**block_format.bits)
    for k in range(2, shares):
        byte.add_(parts[:, k], alpha=2 ** (k * block_format.bits))
    levels.copy_(byte)


def _dequantize_blocks(levels: Tensor, steps: Tensor, block_format: BlockFormat, blocks: Tensor) -> None:
    if block_format.bits == 8:
        blocks.copy_(levels)
    else:
        mask, width = 2**block_format.bits - 1, levels.shape[1]
        parts = torch.empty(len(blocks), 8 // block_format.bits, width, dtype=torch.uint8, device=levels.device)
        for k in range(8 // block_format.bits):
            torch.bitwise_and(levels >> (k * block_format.bits), mask, out=parts[:, k])
        blocks.copy_(parts.view(len(blocks), -1)[:, : blocks.shape[1]])
    blocks.sub_(block_format.centre).mul_(steps.unsqueeze(1))
