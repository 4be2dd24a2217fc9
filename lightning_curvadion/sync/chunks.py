"""A chunk of an exchange on its way: pieces of parcels, side by side in sections of one format each."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import quantization
from .payloads import Parcel

Piece = tuple[Parcel, int, int]

# A mean of signs is no sign: coded in one bit again, it cost four replicas 0.03 of the loss.
MEAN_FORMAT = {"sign": "int2"}


class Section:
    """The numbers of a chunk that travel in one format, cut into shards of whole blocks.

    Args:
        wire_format: The format.
        pieces: Parcels and ranges of their elements.
        shards: Into how many.

    Attributes:
        values: The numbers, flat; once :meth:`take_away` was told what was sent, what is left of them.
        shards: Views of ``values``, equally long but for the end, where some may be empty.
        width: Bytes of the longest coded shard.
        mean_format: How the mean of a shard travels.
        mean_width: Bytes of the longest coded mean.
    """

    def __init__(self, wire_format: str, pieces: Sequence[Piece], shards: int) -> None:
        dtype = torch.float64 if wire_format == "float64" else torch.float32
        self.wire_format = wire_format
        self.values = joined(pieces, dtype)
        self.shards = self._cut(self.values, shards)
        self.width = quantization.encoded_bytes(self.shards[0].numel(), wire_format)
        self.mean_format = MEAN_FORMAT.get(wire_format, wire_format)
        self.mean_width = quantization.encoded_bytes(self.shards[0].numel(), self.mean_format)
        self._pieces = pieces

    def _cut(self, flat: Tensor, shards: int) -> list[Tensor]:
        block = quantization.block_of(self.wire_format)
        length = -(-flat.numel() // (shards * block)) * block
        return [flat[number * length : (number + 1) * length] for number in range(shards)]

    def encode(self, numbers: Tensor) -> Tensor:
        """A coded shard, filled up to the width of all."""
        return _filled(quantization.encode_unchecked(numbers, self.wire_format), self.width)

    def decode(self, payload: Tensor, shard: int) -> Tensor:
        """The numbers of a coded shard."""
        return _numbers(payload, self.wire_format, self.shards[shard].numel())

    def encode_mean(self, mean: Tensor) -> Tensor:
        """The coded mean of a shard, filled up to the width of all."""
        return _filled(quantization.encode_unchecked(mean, self.mean_format), self.mean_width)

    def decode_mean(self, payload: Tensor, shard: int) -> Tensor:
        """The numbers of a coded mean."""
        return _numbers(payload, self.mean_format, self.shards[shard].numel())

    def mean(self, payloads: Tensor, shard: int) -> Tensor:
        """Mean of a shard that every replica coded, shape (replicas, width)."""
        mean = self.decode(payloads[0], shard)
        for payload in payloads[1:]:
            mean.add_(self.decode(payload, shard))
        return mean.div_(len(payloads))

    def take_away(self, payloads: Tensor) -> None:
        """Leave what coding lost of each shard, shape (shards, width)."""
        for shard, payload in enumerate(payloads):
            self.shards[shard].sub_(self.decode(payload, shard))

    def deliver(self, mean: Sequence[Tensor]) -> None:
        """Give the parcels the mean, shard by shard, and what is left of their values.

        Raises:
            ValueError: It is not finite. Every replica has decoded the same bytes, so that all raise, and before
                anything is written.
        """
        flat = torch.cat(list(mean))
        if self.wire_format not in ("float32", "float64") and not bool(torch.isfinite(flat).all()):
            for (parcel, _, _), part in zip(self._pieces, parted(self._pieces, flat), strict=True):
                if not bool(torch.isfinite(part).all()):
                    raise ValueError(quantization.not_codable(parcel.name))
        write(self._pieces, flat, self.values)


def _filled(payload: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(payload, (0, width - payload.numel()))


def _numbers(payload: Tensor, wire_format: str, numel: int) -> Tensor:
    return quantization.decode(payload[: quantization.encoded_bytes(numel, wire_format)], wire_format, numel)


def sections_of(pieces: Sequence[Piece], shards: int) -> list[Section]:
    """The pieces by format, in the order in which the formats appear."""
    by_format: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_format.setdefault(piece[0].wire_format, []).append(piece)
    return [Section(wire_format, members, shards) for wire_format, members in by_format.items()]


def chunks_of(parcels: Sequence[Parcel], most: int) -> Iterator[list[Piece]]:
    """Runs of pieces with ``most`` elements together."""
    pieces: list[Piece] = []
    room = most
    for parcel in parcels:
        start = 0
        while start < parcel.numel:
            stop = min(parcel.numel, start + room)
            pieces.append((parcel, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield pieces
                pieces, room = [], most
    if pieces:
        yield pieces


def joined(pieces: Sequence[Piece], dtype: torch.dtype) -> Tensor:
    """All numbers of the pieces, in a flat tensor of their own."""
    return torch.cat([parcel.read(start, stop).to(dtype) for parcel, start, stop in pieces])


def parted(pieces: Sequence[Piece], flat: Tensor) -> Sequence[Tensor]:
    """The inverse of :func:`joined`, as views."""
    return flat.split([stop - start for _, start, stop in pieces])


def write(pieces: Sequence[Piece], mean: Tensor, lost: Tensor | None) -> None:
    """Give every parcel its part."""
    losses = parted(pieces, lost) if lost is not None else [None] * len(pieces)
    for (parcel, start, stop), part, loss in zip(pieces, parted(pieces, mean), losses, strict=True):
        parcel.write(start, stop, part, loss)
