r"""Wire formats: block-wise quantization of tensors.

A format is one :class:`~lightning_curvadion.WireFormat` with a name; :func:`register_wire_format` adds a user's own. A
quantized tensor is one flat tensor of bytes. The integer formats cut the numbers into blocks of consecutive elements,
the last of them filled up with zeros. Each block has a step s, one bfloat16. A number x becomes the level

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

from .wire_format import PlainFormat, WireFormat

# A Literal, so that a command line lists the choices.
WireFormatName = Literal["float32", "bfloat16", "int8", "int4", "int2", "sign"]
WIRE_FORMATS = get_args(WireFormatName)

_STEP_BYTES = torch.bfloat16.itemsize
# On a CPU so many numbers at a time: the temporaries then stay in its cache.
_CPU_BATCH = 2**17
# Integers of so many bytes.
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class BlockFormat(WireFormat):
    """An integer format.

    Attributes:
        bits: Bits a number, without the steps.
        block: Elements that share a step.
        centre: Level of the number zero.
        step: The steps of blocks, which are the last dimension of a tensor.
        mean_format: Format of the mean over more than two replicas, where it is another one.
    """

    bits: int
    block: int
    centre: float
    step: Callable[[Tensor], Tensor]
    mean_format: str | None = None

    @property
    def level_bytes(self) -> int:
        """Bytes of the levels of a block."""
        return self.block * self.bits // 8

    @property
    def block_bytes(self) -> int:  # type: ignore[override]
        """Bytes of a block: its levels and its step."""
        return self.level_bytes + _STEP_BYTES

    @property
    def clips(self) -> bool:
        """Whether numbers can lie beyond the outermost level."""
        return self.bits < 4

    def quantize_rows(self, numbers: Tensor, numel: int) -> Tensor:
        """The levels of a row, then its steps; all rows at once."""
        shape = (numbers.shape[1] // self.block, self.block)
        blocks = numbers.to(torch.float32).unflatten(1, shape)
        packed = torch.empty(len(numbers), shape[0] * self.block_bytes, dtype=torch.uint8, device=numbers.device)
        levels = self._levels_of(packed)
        steps = torch.empty(blocks.shape[:2], dtype=torch.bfloat16, device=numbers.device)
        for batch in _batches(blocks):
            self._quantize_blocks(blocks[batch], levels[batch], steps[batch])
        last, rest = divmod(numel, self.block)
        if rest:
            # Zeros that are no numbers must not make the step of their block smaller.
            row, column = divmod(last, blocks.shape[1])
            batch = (slice(row, row + 1), slice(column, column + 1))
            self._quantize_blocks(blocks[batch], levels[batch], steps[batch], numel=rest)
        packed[:, packed.shape[1] - _STEP_BYTES * blocks.shape[1] :] = steps.view(torch.uint8)
        return packed

    def dequantize_rows(self, packed: Tensor, out: Tensor) -> Tensor:  # noqa: D102
        levels = self._levels_of(packed)
        blocks = out.unflatten(1, (levels.shape[1], self.block))
        step_bytes = packed[:, packed.shape[1] - _STEP_BYTES * levels.shape[1] :]
        steps = torch.empty(levels.shape[:2], dtype=torch.bfloat16, device=packed.device)
        steps.view(torch.uint8).copy_(step_bytes)
        steps = steps.float()
        for batch in _batches(blocks):
            self._dequantize_blocks(levels[batch], steps[batch], blocks[batch])
        return out

    def _levels_of(self, packed: Tensor) -> Tensor:
        """The levels of quantized rows, shape (rows, blocks, bytes), as a view."""
        count = packed.shape[1] // self.block_bytes
        return packed[:, : count * self.level_bytes].unflatten(1, (count, self.level_bytes))

    def _quantize_blocks(self, blocks: Tensor, levels: Tensor, steps: Tensor, numel: int | None = None) -> None:
        """Write levels and steps. The steps follow from the first ``numel`` elements of each block."""
        step = self.step(blocks[..., :numel]).to(torch.bfloat16)
        # A step too small to be divided by means zero. NaN compares as false, and so stays.
        step.masked_fill_(step < torch.finfo(torch.bfloat16).tiny, 0.0)
        steps.copy_(step)
        inverse = step.float().reciprocal_().masked_fill_(step == 0, 0.0)
        scaled = torch.mul(blocks, inverse.unsqueeze(-1)).add_(self.centre + 0.5)
        if self.clips:
            scaled.clamp_(0, 2**self.bits - 0.5)
        if self.bits == 8:
            levels.copy_(scaled)
            return
        levels.copy_(_packed(scaled.to(torch.uint8), self.bits))

    def _dequantize_blocks(self, levels: Tensor, steps: Tensor, blocks: Tensor) -> None:
        blocks.copy_(levels if self.bits == 8 else _unpacked(levels, self.bits).view(blocks.shape))
        blocks.sub_(self.centre).mul_(steps.unsqueeze(-1))


def _packed(levels: Tensor, bits: int) -> Tensor:
    """Levels of fewer than 8 bits, one a byte, as bytes of several, the first in the lowest bits."""
    # The bytes of a word move next to each other by one product: that of its k-th byte and the k-th power of two lies
    # in its last byte, at the place of the k-th level. No two products meet in one bit, so nothing is carried.
    shares = 8 // bits
    factor = sum(1 << (8 * (shares - 1) - (8 - bits) * k) for k in range(shares))
    return (levels.view(_WORDS[shares]) * factor).view(torch.uint8)[..., shares - 1 :: shares]


def _unpacked(levels: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`_packed`."""
    # The upper half of the levels moves to the middle of the word, then the upper half of either half, and so on.
    shares = 8 // bits
    words, part = levels.to(_WORDS[shares]), shares // 2
    while part:
        mask = sum(((1 << part * bits) - 1) << 8 * start for start in range(0, shares, part))
        words = (words << part * (8 - bits)).bitwise_or_(words).bitwise_and_(mask)
        part //= 2
    return words.view(torch.uint8)


def _batches(blocks: Tensor) -> Iterator[tuple[slice, slice]]:
    """Batches of blocks, shape (rows, blocks, elements): a part of one row, or several whole rows."""
    rows, count, numel = blocks.shape
    at_a_time = max(1, _CPU_BATCH // numel) if blocks.device.type == "cpu" else max(1, rows * count)
    several = max(1, at_a_time // max(1, count))
    for row in range(0, rows, several):
        for start in range(0, count, at_a_time):
            yield slice(row, row + several), slice(start, start + at_a_time)


def _of_largest(levels: int) -> Callable[[Tensor], Tensor]:
    # Rounded to bfloat16, by up to 1/256 of itself: 127 levels become 126.504 to 127.496, so that the largest number
    # takes the outermost level whichever way the step was rounded, and quantizing twice changes nothing.
    return lambda blocks: blocks.abs().amax(dim=-1).div_(levels)


# -- formats by name --------------------------------------------------------------------------------------------------

# float64 is for tensors that must not be rounded; it is no user's choice.
_PLAIN = {name: PlainFormat(getattr(torch, name)) for name in ("float64", "float32", "bfloat16")}
BLOCK_FORMATS = {
    "int8": BlockFormat(8, 128, 128.0, _of_largest(127)),
    "int4": BlockFormat(4, 64, 8.0, _of_largest(7)),
    "int2": BlockFormat(
        2, 64, 1.5, lambda blocks: torch.linalg.vector_norm(blocks, dim=-1).mul_(0.9957 / math.sqrt(blocks.shape[-1]))
    ),
    # A mean of signs is no sign: quantized to one bit again, it cost four replicas 0.03 of the loss.
    "sign": BlockFormat(1, 128, 0.5, lambda blocks: blocks.abs().mean(dim=-1).mul_(2.0), mean_format="int2"),
}
_REGISTERED: dict[str, WireFormat] = {}


def register_wire_format(name: str, wire_format: WireFormat) -> None:
    """Let ``wire_format=name`` mean a format of your own, in every process, before the hook or the strategy is built.

    Raises:
        ValueError: The name is taken, or the format does not return what :class:`WireFormat` says.

    Example:
        >>> register_wire_format("sign", BLOCK_FORMATS["int2"])
        Traceback (most recent call last):
        ValueError: the wire format 'sign' exists already; choose another name
    """
    if name in (*_PLAIN, *BLOCK_FORMATS):
        raise ValueError(f"the wire format {name!r} exists already; choose another name")
    numbers = torch.linspace(-1, 1, 4 * wire_format.block).view(2, -1)
    packed = wire_format.quantize_rows(numbers, numbers.numel())
    expected = (2, 2 * wire_format.block_bytes)
    if packed.shape != expected or packed.dtype != torch.uint8:
        raise ValueError(
            f"quantize_rows of the wire format {name!r} must return uint8 of shape (rows, bytes), here {expected}, not"
            f" {packed.dtype} of shape {tuple(packed.shape)}"
        )
    if not torch.isfinite(wire_format.dequantize_rows(packed, torch.full_like(numbers, math.nan))).all():
        raise ValueError(f"dequantize_rows of the wire format {name!r} must write all of out, with finite numbers")
    _REGISTERED[name] = wire_format


def wire_formats() -> tuple[str, ...]:
    """Names of all formats that can be chosen."""
    return (*WIRE_FORMATS, *_REGISTERED)


def format_of(name: str) -> WireFormat:
    """The format of a name."""
    return BLOCK_FORMATS.get(name) or _PLAIN.get(name) or _REGISTERED[name]


def bits_of(wire_format: str) -> float:
    """Bits a number, steps included.

    Example:
        >>> bits_of("int4"), bits_of("bfloat16")
        (4.25, 16.0)
    """
    form = format_of(wire_format)
    return 8 * form.block_bytes / form.block


def block_of(wire_format: str) -> int:
    """Elements that share a step; 1 for the formats without blocks.

    Example:
        >>> block_of("int2"), block_of("bfloat16")
        (64, 1)
    """
    return format_of(wire_format).block


def mean_format_of(wire_format: str) -> str:
    """The format in which the mean of quantized numbers travels between more than two replicas.

    Example:
        >>> mean_format_of("int4"), mean_format_of("sign")
        ('int4', 'int2')
    """
    return format_of(wire_format).mean_format or wire_format


def quantized_bytes(numel: int, wire_format: str) -> int:
    """Bytes of ``numel`` quantized numbers, with the steps of their blocks.

    Example:
        >>> [quantized_bytes(1_000_000, wire_format) for wire_format in ("float32", "int8", "sign")]
        [4000000, 1015690, 140634]
    """
    form = format_of(wire_format)
    return -(-numel // form.block) * form.block_bytes


def quantize(tensor: Tensor, wire_format: str, name: str = "tensor") -> Tensor:
    """Quantize a tensor.

    Args:
        tensor: Floating-point, of any shape.
        wire_format: The name of a format.
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
    numel = tensor.numel()
    flat = torch.nn.functional.pad(tensor.reshape(-1), (0, -numel % block_of(wire_format)))
    packed = quantize_rows(flat.unsqueeze(0), wire_format, numel)[0]
    if numel and not bool(torch.isfinite(dequantize(packed, wire_format, numel)).all()):
        raise ValueError(not_quantizable(name))
    return packed


def dequantize(packed: Tensor, wire_format: str, numel: int) -> Tensor:
    """The numbers of a quantized tensor, shape ``(numel,)``: float32, or float64 with ``"float64"``.

    Args:
        packed: What :func:`quantize` returned.
        wire_format: The same as there.
        numel: How many numbers were quantized.
    """
    filled = -(-numel // block_of(wire_format)) * block_of(wire_format)
    dtype = torch.float64 if wire_format == "float64" else torch.float32
    out = torch.empty(1, filled, dtype=dtype, device=packed.device)
    return dequantize_rows(packed.unsqueeze(0), wire_format, out)[0, :numel]


def not_quantizable(name: str) -> str:
    """The error message for a tensor that holds NaN, infinite or far too large numbers."""
    return (
        f"Lower the learning rate, or skip the batch at which training diverged: {name} holds NaN, infinite or far too"
        " large numbers and cannot be quantized"
    )


def quantize_rows(numbers: Tensor, wire_format: str, numel: int) -> Tensor:
    """Quantize the rows of a contiguous tensor, all at once, and unchecked: NaN makes its block anything.

    Args:
        numbers: Shape (rows, elements), of whole blocks.
        wire_format: The name of a format.
        numel: How many of all elements are numbers. The others are zeros at the end.

    Returns:
        uint8, shape ``(rows, quantized_bytes(elements, wire_format))``.
    """
    return format_of(wire_format).quantize_rows(numbers, numel)


def dequantize_rows(packed: Tensor, wire_format: str, out: Tensor) -> Tensor:
    """The inverse of :func:`quantize_rows`.

    Args:
        packed: What it returned.
        wire_format: The same as there.
        out: Receives all elements, contiguous, shape (rows, elements): float32, or float64 with ``"float64"``.
    """
    return format_of(wire_format).dequantize_rows(packed, out)
