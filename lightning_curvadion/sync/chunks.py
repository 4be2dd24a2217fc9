"""Chunks and buckets: payloads are cut into chunks, and the slices of a chunk are packed into one bucket per format."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import quantization
from .payloads import Payload

FULL_WIDTH = ("float32", "float64")


class PayloadSlice(NamedTuple):
    """A range of the flat elements of a payload."""

    payload: Payload
    start: int
    stop: int


class Bucket:
    """The numbers of a chunk that travel in one format, cut into shards of whole quantization blocks.

    Args:
        wire_format: The format.
        slices: Slices of payloads of this format.
        shards: Number of shards.

    Attributes:
        values: The numbers, flat; after :meth:`subtract_sent` their quantization error.
        shards: Views of ``values``, of equal length but for the last ones, which may be shorter or empty.
        width: Bytes of the longest quantized shard.
        mean_format: Format in which the mean of a shard travels.
        mean_width: Bytes of the longest quantized mean.
    """

    def __init__(self, wire_format: str, slices: Sequence[PayloadSlice], shards: int) -> None:
        dtype = torch.float64 if wire_format == "float64" else torch.float32
        self.wire_format = wire_format
        self.values = flatten(slices, dtype)
        self.shards = self._cut(self.values, shards)
        self.width = quantization.quantized_bytes(self.shards[0].numel(), wire_format)
        self.mean_format = quantization.mean_format_of(wire_format)
        self.mean_width = quantization.quantized_bytes(self.shards[0].numel(), self.mean_format)
        self._slices = slices

    def _cut(self, flat: Tensor, shards: int) -> list[Tensor]:
        block = quantization.block_of(self.wire_format)
        length = -(-flat.numel() // (shards * block)) * block
        return [flat[number * length : (number + 1) * length] for number in range(shards)]

    def quantize(self, numbers: Tensor) -> Tensor:
        """A quantized shard, padded to ``width`` bytes."""
        return _padded(quantization.quantize_unchecked(numbers, self.wire_format), self.width)

    def dequantize(self, packed: Tensor, shard: int) -> Tensor:
        """The numbers of a quantized shard."""
        return _numbers(packed, self.wire_format, self.shards[shard].numel())

    def quantize_mean(self, mean: Tensor) -> Tensor:
        """The quantized mean of a shard, padded to ``mean_width`` bytes."""
        return _padded(quantization.quantize_unchecked(mean, self.mean_format), self.mean_width)

    def dequantize_mean(self, packed: Tensor, shard: int) -> Tensor:
        """The numbers of a quantized mean."""
        return _numbers(packed, self.mean_format, self.shards[shard].numel())

    def mean(self, packed: Tensor, shard: int) -> Tensor:
        """Mean of one shard over the replicas, given what each sent of it, shape (replicas, width)."""
        mean = self.dequantize(packed[0], shard)
        for row in packed[1:]:
            mean.add_(self.dequantize(row, shard))
        return mean.div_(len(packed))

    def subtract_sent(self, packed: Tensor) -> None:
        """Subtract what was sent, shape (shards, width), from the values: the quantization error remains."""
        for shard, row in enumerate(packed):
            self.shards[shard].sub_(self.dequantize(row, shard))

    def write_back(self, means: Sequence[Tensor]) -> None:
        """Give the payloads the mean, shard by shard, and their quantization error."""
        write_back(self._slices, torch.cat(list(means)), self.values)


def _padded(packed: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(packed, (0, width - packed.numel()))


def _numbers(packed: Tensor, wire_format: str, numel: int) -> Tensor:
    return quantization.dequantize(packed[: quantization.quantized_bytes(numel, wire_format)], wire_format, numel)


def buckets_of(slices: Sequence[PayloadSlice], shards: int) -> list[Bucket]:
    """One bucket per format, in the order in which the formats first occur."""
    by_format: dict[str, list[PayloadSlice]] = {}
    for part in slices:
        by_format.setdefault(part.payload.wire_format, []).append(part)
    return [Bucket(wire_format, members, shards) for wire_format, members in by_format.items()]


def split_into_chunks(payloads: Sequence[Payload], chunk: int) -> Iterator[list[PayloadSlice]]:
    """Cut payloads into runs of slices with at most ``chunk`` elements together."""
    slices: list[PayloadSlice] = []
    room = chunk
    for payload in payloads:
        start = 0
        while start < payload.numel:
            stop = min(payload.numel, start + room)
            slices.append(PayloadSlice(payload, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield slices
                slices, room = [], chunk
    if slices:
        yield slices


def split_tensors(tensors: Iterable[Tensor], nbytes: int) -> Iterator[list[Tensor]]:
    """Cut tensors into runs of parts with at most ``nbytes`` bytes together.

    The parts follow from the shapes alone, and not from the strides, which may differ between replicas.
    """
    parts: list[Tensor] = []
    room = nbytes
    for tensor in tensors:
        for part in _parts(tensor.detach(), max(1, nbytes // tensor.itemsize)):
            if part.nbytes > room and parts:
                yield parts
                parts, room = [], nbytes
            parts.append(part)
            room -= part.nbytes
    if parts:
        yield parts


def _parts(tensor: Tensor, numel: int) -> Iterator[Tensor]:
    """Views with at most ``numel`` elements each, by rows, or by rows of rows: a flat copy would be as large again."""
    if tensor.numel() <= numel:
        if tensor.numel():
            yield tensor
    elif rows := numel // tensor[0].numel():
        yield from tensor.split(rows)
    else:
        for row in tensor:
            yield from _parts(row, numel)


def flatten(slices: Sequence[PayloadSlice], dtype: torch.dtype) -> Tensor:
    """A new flat tensor with the numbers of all slices."""
    return torch.cat([payload.read(start, stop).to(dtype) for payload, start, stop in slices])


def unflatten(slices: Sequence[PayloadSlice], flat: Tensor) -> Sequence[Tensor]:
    """The inverse of :func:`flatten`, as views."""
    return flat.split([stop - start for _, start, stop in slices])


def write_back(slices: Sequence[PayloadSlice], mean: Tensor, error: Tensor | None) -> None:
    """Give every payload its part of the mean and of the quantization error."""
    errors = unflatten(slices, error) if error is not None else [None] * len(slices)
    for (payload, start, stop), part, own in zip(slices, unflatten(slices, mean), errors, strict=True):
        payload.write(start, stop, part, own)
