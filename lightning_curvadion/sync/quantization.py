r"""How numbers are coded on the way: pure functions on tensors.

A coded tensor is one flat tensor of bytes. The integer formats cut the numbers into blocks of consecutive elements and
give each block a step s, one bfloat16. A number x becomes the level

.. math:: u = \mathrm{trunc}(x / s + c + 1/2), \qquad \hat x = s\,(u - c),

clamped to the levels that its bits offer, several to a byte:

===========  ====  =====  ========  ==================  ==================================================
format       bits  block  centre c  step s              with the steps, bits a number (of 32 in float32)
===========  ====  =====  ========  ==================  ==================================================
``int8``     8     128    128       largest / 127       8.125 (1 / 3.9)
``int4``     4     64     8         largest / 7         4.25  (1 / 7.5)
``int2``     2     64     3/2       0.9957 rms          2.25  (1 / 14.2)
``sign``     1     128    1/2       2 mean of \|x\|     1.125 (1 / 28.4)
===========  ====  =====  ========  ==================  ==================================================

A step from the largest number clips nothing; at 2 bits that would leave nearly everything on the two inner levels, so
there it is the one that loses least of a normal distribution (Max, 1960, "Quantizing for minimum distortion"), and at 1
bit the one that loses least of any. Half the block would lower the error of ``int2`` by 4 % for 11 % more bytes, twice
the block raise it by 5 % for 6 % fewer (``examples/benchmarks/wire.py --blocks``).

Numbers so small that a block's step is no normal bfloat16 (about 1e-38, with ``int2`` about 1e-22) are coded as zero.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

WireFormat = Literal["float32", "bfloat16", "int8", "int4", "int2", "sign"]
WIRE_FORMATS = get_args(WireFormat)

# Numbers that travel as they are. Wider formats are for what must not be rounded; users choose float32 at most.
_PLAIN = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
# A CPU works on so many numbers at a time: the temporaries stay in its cache.
_PIECE = 2**17


@dataclass(frozen=True)
class Coding:
    """An integer format: so many bits a number, a step for each block, and the level of a zero."""

    bits: int
    block: int
    centre: float
    step: Callable[[Tensor], Tensor]

    @property
    def clips(self) -> bool:
        """Whether numbers can lie beyond the outermost level."""
        return self.bits < 4


def _of_largest(levels: int) -> Callable[[Tensor], Tensor]:
    # Rounded to bfloat16, by up to 1/256 of itself: 127 levels become 126.504 to 127.496, so that the largest number
    # takes the outermost level whichever way the step was rounded, and a decoded tensor codes to itself.
    return lambda blocks: blocks.abs().amax(dim=1).div_(levels)


CODINGS = {
    "int8": Coding(8, 128, 128.0, _of_largest(127)),
    "int4": Coding(4, 64, 8.0, _of_largest(7)),
    "int2": Coding(
        2, 64, 1.5, lambda blocks: torch.linalg.vector_norm(blocks, dim=1).mul_(0.9957 / math.sqrt(blocks.shape[1]))
    ),
    "sign": Coding(1, 128, 0.5, lambda blocks: blocks.abs().mean(dim=1).mul_(2.0)),
}


def block_of(wire_format: str) -> int:
    """Elements that share a step; 1 where numbers travel as they are.

    Example:
        >>> block_of("int2"), block_of("bfloat16")
        (64, 1)
    """
    return CODINGS[wire_format].block if wire_format in CODINGS else 1


def encoded_bytes(numel: int, wire_format: str) -> int:
    """Bytes of ``numel`` coded numbers, the steps of their blocks included.

    Example:
        >>> [encoded_bytes(1_000_000, wire_format) for wire_format in ("float32", "int8", "sign")]
        [4000000, 1015626, 140626]
    """
    if wire_format in _PLAIN:
        return numel * _PLAIN[wire_format].itemsize
    coding = CODINGS[wire_format]
    return -(-numel * coding.bits // 8) + 2 * -(-numel // coding.block)


def encode(tensor: Tensor, wire_format: str, name: str = "tensor") -> Tensor:
    """Code a tensor.

    Args:
        tensor: Floating-point, of any shape.
        wire_format: One of ``WIRE_FORMATS``.
        name: What to call the tensor in an error.

    Returns:
        uint8, shape ``(encoded_bytes(tensor.numel(), wire_format),)``: the levels, then the steps.

    Raises:
        ValueError: A number is NaN or infinite, or too large for the format.

    Example:
        >>> payload = encode(torch.tensor([0.5, -1.0, 0.25]), "int8")
        >>> decode(payload, "int8", 3)
        tensor([ 0.5039, -0.9999,  0.2520])
    """
    payload = encode_unchecked(tensor, wire_format)
    if tensor.numel() and not bool(torch.isfinite(decode(payload, wire_format, tensor.numel())).all()):
        raise ValueError(not_codable(name))
    return payload


def not_codable(name: str) -> str:
    """What to tell the user about a tensor that holds NaN, infinite or far too large numbers."""
    return (
        f"{name} cannot be coded: it holds NaN, infinite or far too large numbers; has training diverged? lower the lr"
    )


def encode_unchecked(tensor: Tensor, wire_format: str) -> Tensor:
    """:func:`encode` that leaves NaN and infinity for the reader to notice: their whole block comes out like that."""
    flat = tensor.reshape(-1)
    if wire_format in _PLAIN:
        return flat.to(_PLAIN[wire_format]).contiguous().view(torch.uint8)
    flat = flat.to(torch.float32)
    payload = torch.empty(encoded_bytes(flat.numel(), wire_format), dtype=torch.uint8, device=flat.device)
    coding = CODINGS[wire_format]
    steps = torch.empty(-(-flat.numel() // coding.block), dtype=torch.bfloat16, device=flat.device)
    for blocks, levels, rows in _pieces(flat, payload, coding):
        _encode_blocks(blocks, coding, levels, steps[rows])
    payload[payload.numel() - steps.nbytes :] = steps.view(torch.uint8)
    return payload


def decode(payload: Tensor, wire_format: str, numel: int, out: Tensor | None = None) -> Tensor:
    """The numbers of a coded tensor, shape ``(numel,)``: float32, or float64 where they travelled as float64.

    Args:
        payload: What :func:`encode` returned.
        wire_format: As given there.
        numel: How many numbers were coded.
        out: Contiguous tensor of the result's shape and dtype to write to.
    """
    if wire_format in _PLAIN:
        # Bytes are copied, not viewed: numbers must start at a multiple of their size.
        numbers = torch.empty(numel, dtype=_PLAIN[wire_format], device=payload.device)
        numbers.view(torch.uint8).copy_(payload)
        if out is not None:
            return out.copy_(numbers)
        return numbers.float() if wire_format == "bfloat16" else numbers
    numbers = torch.empty(numel, dtype=torch.float32, device=payload.device) if out is None else out
    coding = CODINGS[wire_format]
    count = -(-numel // coding.block)
    steps = payload[payload.numel() - 2 * count :].clone().view(torch.bfloat16).float()
    for blocks, levels, rows in _pieces(numbers, payload, coding):
        _decode_blocks(levels, steps[rows], coding, blocks)
    return numbers


def _pieces(flat: Tensor, payload: Tensor, coding: Coding) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Views of some blocks at a time, (rows, elements), of their levels, (rows, bytes), and which rows these are."""
    whole, rest = divmod(flat.numel(), coding.block)
    levels = payload[: -(-flat.numel() * coding.bits // 8)]
    width = coding.block * coding.bits // 8
    split = whole * width
    many, many_levels = flat[: flat.numel() - rest].view(whole, coding.block), levels[:split].view(whole, width)
    at_a_time = max(1, _PIECE // coding.block) if flat.device.type == "cpu" else max(1, whole)
    for start in range(0, whole, at_a_time):
        rows = slice(start, min(start + at_a_time, whole))
        yield many[rows], many_levels[rows], rows
    if rest:
        yield flat[flat.numel() - rest :].unsqueeze(0), levels[split:].unsqueeze(0), slice(whole, whole + 1)


def _encode_blocks(blocks: Tensor, coding: Coding, levels: Tensor, steps: Tensor) -> None:
    step = coding.step(blocks).to(torch.bfloat16)
    # A step too small to be divided by means zero. NaN compares as false, and so stays.
    step = torch.where(step < torch.finfo(torch.bfloat16).tiny, 0.0, step)
    steps.copy_(step)
    inverse = torch.where(step == 0, 0.0, step.float().reciprocal())
    scaled = torch.mul(blocks, inverse.unsqueeze(1)).add_(coding.centre + 0.5)
    if coding.clips:
        scaled.clamp_(0, 2**coding.bits - 0.5)
    if coding.bits == 8:
        levels.copy_(scaled)
        return
    # The k-th share of a byte comes from the k-th part of the block: neighbours stay neighbours, which is fast, as is
    # adding the shares as floating-point numbers, of which a byte is exactly one.
    shares = 8 // coding.bits
    if scaled.shape[1] % shares:
        scaled = torch.nn.functional.pad(scaled, (0, -scaled.shape[1] % shares))
    parts = scaled.floor_().view(len(blocks), shares, -1)
    byte = torch.add(parts[:, 0], parts[:, 1], alpha=2**coding.bits)
    for k in range(2, shares):
        byte.add_(parts[:, k], alpha=2 ** (k * coding.bits))
    levels.copy_(byte)


def _decode_blocks(levels: Tensor, steps: Tensor, coding: Coding, blocks: Tensor) -> None:
    if coding.bits == 8:
        blocks.copy_(levels)
    else:
        mask, width = 2**coding.bits - 1, levels.shape[1]
        parts = torch.empty(len(blocks), 8 // coding.bits, width, dtype=torch.uint8, device=levels.device)
        for k in range(8 // coding.bits):
            torch.bitwise_and(levels >> (k * coding.bits), mask, out=parts[:, k])
        blocks.copy_(parts.view(len(blocks), -1)[:, : blocks.shape[1]])
    blocks.sub_(coding.centre).mul_(steps.unsqueeze(1))


def integers_to_numbers(tensor: Tensor) -> Tensor:
    """The bytes of an integer or boolean tensor as small float32 numbers, exact in a mean of one and many zeros."""
    return tensor.reshape(-1).contiguous().view(torch.int8).float()


def numbers_to_integers(numbers: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`integers_to_numbers`."""
    return numbers.to(torch.int8).view(like.dtype).view(like.shape)
