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

    All shards are quantized at once, as rows of one tensor that is filled up with zeros.

    Args:
        wire_format: The format.
        slices: Slices of payloads of this format.
        shards: Number of shards.

    Attributes:
        rows: The numbers, shape (shards, elements). Once what was sent is subtracted, they are the quantization error.
            Read again from the payloads after they were released.
        width: Bytes of a quantized shard.
        mean_width: Bytes of the quantized mean of a shard.
        mean_format: The format of the mean.
    """

    def __init__(self, wire_format: str, slices: Sequence[PayloadSlice], shards: int) -> None:
        block = quantization.block_of(wire_format)
        self._numel = sum(stop - start for _, start, stop in slices)
        length = -(-self._numel // (shards * block)) * block
        self._shape = shards, length
        self._rows: Tensor | None = None
        self.wire_format, self.mean_format = wire_format, quantization.mean_format_of(wire_format)
        self.width = quantization.quantized_bytes(length, self.wire_format)
        self.mean_width = quantization.quantized_bytes(length, self.mean_format)
        self.slices = slices
        self._dequantized: Tensor | None = None

    @property
    def rows(self) -> Tensor:  # noqa: D102
        if self._rows is None:
            dtype = torch.float64 if self.wire_format == "float64" else torch.float32
            shards, length = self._shape
            self._rows = flatten(self.slices, dtype, fill=shards * length - self._numel).view(shards, length)
        return self._rows

    def quantize(self, release: bool = False) -> Tensor:
        """The quantized shards, shape (shards, width).

        Args:
            release: Whether the memory of the rows is freed until they are needed again.
        """
        quantized = quantization.quantize_rows(self.rows, self.wire_format, self._numel)
        if release:
            self._rows = None
        return quantized

    def dequantize(self, packed: Tensor) -> Tensor:
        """The numbers of quantized shards, one in each row of a buffer that the next call overwrites."""
        return self._dequantize(packed, self.wire_format)

    def mean(self, packed: Tensor, shard: int) -> Tensor:
        """Mean of one shard over the replicas, given what each sent of it, shape (replicas, width)."""
        mean = self.dequantize(packed).sum(dim=0).div_(len(packed))
        # Zeros that fill up a block may have been quantized to other numbers.
        mean[self._numel_of(shard) :].zero_()
        return mean

    def quantize_mean(self, mean: Tensor, shard: int) -> Tensor:
        """The quantized mean of a shard, shape (mean width,)."""
        return quantization.quantize_rows(mean.unsqueeze(0), self.mean_format, self._numel_of(shard))[0]

    def dequantize_mean(self, packed: Tensor) -> Tensor:
        """The numbers of the quantized means of all shards, in the same buffer."""
        return self._dequantize(packed, self.mean_format)

    def write_back(self, mean: Tensor) -> None:
        """Give the payloads the mean, which has as many elements as ``rows``, and their quantization error."""
        write_back(self.slices, mean.view(-1)[: self._numel], self.rows.view(-1)[: self._numel])

    def _dequantize(self, packed: Tensor, wire_format: str) -> Tensor:
        # One buffer for all: on a CPU, new memory takes longer than its numbers.
        if self._dequantized is None:
            self._dequantized = self.rows.new_empty(len(packed), self._shape[1])
        return quantization.dequantize_rows(packed, wire_format, self._dequantized)

    def _numel_of(self, shard: int) -> int:
        _, length = self._shape
        return min(length, max(0, self._numel - shard * length))


def buckets_of(slices: Sequence[PayloadSlice], shards: int) -> list[Bucket]:
    """One bucket per format, in the order in which the formats first occur."""
    by_format: dict[str, list[PayloadSlice]] = {}
    for part in slices:
        by_format.setdefault(part.payload.wire_format, []).append(part)
    return [Bucket(wire_format, members, shards) for wire_format, members in by_format.items()]


def split_into_chunks(payloads: Sequence[Payload], chunk: int) -> Iterator[list[PayloadSlice]]:
    """Cut payloads into runs of slices with at most ``chunk`` elements together."""
    return split_slices([PayloadSlice(payload, 0, payload.numel) for payload in payloads], chunk)


def split_slices(parts: Iterable[PayloadSlice], chunk: int) -> Iterator[list[PayloadSlice]]:
    """Cut slices of payloads into runs of smaller ones with at most ``chunk`` elements together."""
    slices: list[PayloadSlice] = []
    room = chunk
    for payload, start, end in parts:
        while start < end:
            stop = min(end, start + room)
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


def flatten(
    slices: Sequence[PayloadSlice], dtype: torch.dtype, fill: int = 0, device: torch.device | None = None
) -> Tensor:
    """A new flat tensor with the numbers of all slices, followed by ``fill`` zeros; ``None`` is their own device."""
    numbers = [payload.read(start, stop).to(device=device, dtype=dtype) for payload, start, stop in slices]
    return torch.cat([*numbers, numbers[0].new_zeros(fill)])


def unflatten(slices: Sequence[PayloadSlice], flat: Tensor) -> Sequence[Tensor]:
    """The inverse of :func:`flatten`, as views."""
    return flat.split([stop - start for _, start, stop in slices])


def write_back(slices: Sequence[PayloadSlice], mean: Tensor, error: Tensor | None) -> None:
    """Give every payload its part of the mean and of the quantization error."""
    errors = unflatten(slices, error) if error is not None else [None] * len(slices)
    for (payload, start, stop), part, own in zip(slices, unflatten(slices, mean), errors, strict=True):
        payload.write(start, stop, part, own)
