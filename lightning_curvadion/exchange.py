"""The mean of parcels over the replicas, coded on the way and the same bits on all of them; every collective is here.

Collectives are called through the ``torch.distributed`` module, so that they can be counted from outside. The parcels
of an exchange travel together, whatever their number and their formats:

- All at full width: one all-reduce of one flat buffer.
- Coded, up to two replicas: one all-gather; everybody decodes everything and takes the mean.
- Coded, more replicas: an all-to-all, in which each replica gets one shard of everybody's numbers; it takes the shard's
  mean in float32 and codes that; an all-gather brings all shards to all. No replica receives more than twice the
  payload, however many they are. (An all-reduce cannot add integers of two bits, and an all-gather alone would grow
  with the number of replicas.) What coding the mean loses counts as lost by the owner of the shard, as many times as
  there are replicas, so that the mean is exactly the mean of what the replicas are said to have sent.

Buffers larger than a chunk travel a chunk at a time, with so many collectives each.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.profiler import record_function

from . import wire
from .parcels import Parcel

# Numbers on their way at a time, so 64 MiB of float32: enough to fill any network, little beside a model.
CHUNK = 2**24

Piece = tuple[Parcel, int, int]


class Exchange:
    """Collectives of one process group, and how much they sent.

    Args:
        group: Process group; ``None`` is the default group.
        chunk: Numbers that are coded, sent and decoded at a time.

    Attributes:
        bytes_sent: Payload of this replica so far. An all-reduce of n bytes counts n, an all-gather the replica's own
            share, an all-to-all what goes to others, a broadcast counts at its source: the mean of a coded tensor of n
            bytes counts n, however many replicas there are.
    """

    def __init__(self, group: ProcessGroup | None = None, chunk: int = CHUNK) -> None:
        self.bytes_sent = 0
        self.rank = 0
        self.world_size = 1
        self._group = group
        self._chunk = chunk

    def join(self) -> None:
        """Learn this replica's place in the process group, which must be initialised by now."""
        self.rank, self.world_size = dist.get_rank(self._group), dist.get_world_size(self._group)

    @property
    def backend(self) -> str:
        """Name of what carries the bytes, such as ``"gloo"``."""
        return dist.get_backend(self._group)

    # -- small things -----------------------------------------------------------------------------------------------

    def maximum(self, signal: Tensor) -> None:
        """Replace ``signal`` by its element-wise maximum over the replicas."""
        self.bytes_sent += signal.nbytes
        dist.all_reduce(signal, op=dist.ReduceOp.MAX, group=self._group)

    def gather(self, own: Tensor) -> list[Tensor]:
        """Everybody's tensor, in the order of the ranks."""
        everyone = [torch.empty_like(own) for _ in range(self.world_size)]
        self.bytes_sent += own.nbytes
        dist.all_gather(everyone, own, group=self._group)
        return everyone

    def gather_objects(self, own: Any) -> list[Any]:
        """Everybody's object, in the order of the ranks; for errors."""
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, own, group=self._group)
        return everyone

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Rank 0's values for everybody, one collective for each dtype."""
        source = 0 if self._group is None else dist.get_global_rank(self._group, 0)
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            alike = [tensor.detach() for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in alike])
            self.bytes_sent += flat.nbytes if self.rank == 0 else 0
            dist.broadcast(flat, src=source, group=self._group)
            for tensor, values in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
                tensor.copy_(values.view(tensor.shape))

    # -- means ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def average(self, parcels: Sequence[Parcel]) -> None:
        """Replace what the parcels hold by the mean over the replicas.

        Raises:
            ValueError: A coded tensor of some replica holds a number that is not finite; on all replicas alike.
        """
        coded = any(parcel.wire_format not in ("float32", "float64") for parcel in parcels)
        for pieces in _chunks(parcels, self._chunk):
            if not coded:
                self.reduce(pieces)
            elif self.world_size <= 2:
                self.exchange_directly(pieces)
            else:
                self.exchange_shards(pieces)
        for parcel in parcels:
            parcel.finish()

    def reduce(self, pieces: Sequence[Piece]) -> None:
        """At full width: one all-reduce."""
        wide = any(parcel.wire_format == "float64" for parcel, _, _ in pieces)
        flat = _flat(pieces, torch.float64 if wide else torch.float32)
        # Divided first: the sum cannot overflow, and equal numbers on 2, 3 or 4 replicas keep their exact value.
        flat.div_(self.world_size)
        self.bytes_sent += flat.nbytes
        with record_function("curvadion::exchange"):
            dist.all_reduce(flat, group=self._group)
        _write(pieces, flat, None)

    def exchange_directly(self, pieces: Sequence[Piece]) -> None:
        """Everybody's coded numbers for everybody: one all-gather."""
        sections = _sections(pieces)
        with record_function("curvadion::encode"):
            values = [_flat(section, _dtype(wire_format)) for wire_format, section in sections.items()]
            own = torch.cat([wire.encode_unchecked(v, f) for v, f in zip(values, sections, strict=True)])
        gathered = own.new_empty(self.world_size, own.numel())
        self.bytes_sent += own.nbytes
        with record_function("curvadion::exchange"):
            dist.all_gather(list(gathered), own, group=self._group)
        with record_function("curvadion::decode"):
            start = 0
            for (wire_format, section), value in zip(sections.items(), values, strict=True):
                stop = start + wire.encoded_bytes(value.numel(), wire_format)
                mean = self._mean(gathered[:, start:stop], wire_format, value.numel())
                _check(section, mean, wire_format)
                _write(section, mean, value.sub_(_decode(own[start:stop], wire_format, value.numel())))
                start = stop

    def exchange_shards(self, pieces: Sequence[Piece]) -> None:
        """A shard of everybody's coded numbers for each, and the coded means for all: all-to-all, then all-gather."""
        sections = _sections(pieces)
        with record_function("curvadion::encode"):
            values = [_flat(section, _dtype(wire_format)) for wire_format, section in sections.items()]
            shards = [_shards(v, self.world_size, wire.block_of(f)) for v, f in zip(values, sections, strict=True)]
            # Every replica's row of a section has the bytes of its longest shard, the first.
            widths = [wire.encoded_bytes(parts[0].numel(), f) for parts, f in zip(shards, sections, strict=True)]
            outgoing = torch.zeros(self.world_size, sum(widths), dtype=torch.uint8, device=values[0].device)
            for row, *parts in zip(outgoing, *shards, strict=True):
                _encode_into(row, parts, sections, widths)
        incoming = torch.empty_like(outgoing)
        self.bytes_sent += outgoing.nbytes // self.world_size * (self.world_size - 1)
        with record_function("curvadion::exchange"):
            dist.all_to_all_single(incoming.view(-1), outgoing.view(-1), group=self._group)

        with record_function("curvadion::decode"):
            own_shards = [parts[self.rank] for parts in shards]
            columns = incoming.split(widths, dim=1)
            shard_means = [
                self._mean(c, f, shard.numel()) for c, f, shard in zip(columns, sections, own_shards, strict=True)
            ]
        with record_function("curvadion::encode"):
            own = torch.zeros(sum(widths), dtype=torch.uint8, device=outgoing.device)
            _encode_into(own, shard_means, sections, widths)
        gathered = own.new_empty(self.world_size, own.numel())
        self.bytes_sent += own.nbytes
        with record_function("curvadion::exchange"):
            dist.all_gather(list(gathered), own, group=self._group)

        with record_function("curvadion::decode"):
            arrived, sent = gathered.split(widths, dim=1), outgoing.split(widths, dim=1)
            for number, (wire_format, section) in enumerate(sections.items()):
                mean = torch.empty_like(values[number])
                means = _shards(mean, self.world_size, wire.block_of(wire_format))
                for part, payload in zip(means, arrived[number], strict=True):
                    _decode(payload, wire_format, part.numel(), out=part)
                _check(section, mean, wire_format)
                for part, payload in zip(shards[number], sent[number], strict=True):
                    part.sub_(_decode(payload, wire_format, part.numel()))
                own_shards[number].add_(shard_means[number] - means[self.rank], alpha=self.world_size)
                _write(section, mean, values[number])

    def _mean(self, coded: Tensor, wire_format: str, numel: int) -> Tensor:
        """Mean of everybody's coded numbers, shape (ranks, bytes)."""
        mean = _decode(coded[0], wire_format, numel)
        for payload in coded[1:]:
            mean.add_(_decode(payload, wire_format, numel))
        return mean.div_(self.world_size)


def _shards(flat: Tensor, count: int, block: int) -> list[Tensor]:
    """Views of consecutive parts of whole blocks, equally long but for the end, where some may be empty."""
    length = -(-flat.numel() // (count * block)) * block
    return [flat[number * length : (number + 1) * length] for number in range(count)]


def _encode_into(row: Tensor, parts: Sequence[Tensor], formats: Iterable[str], widths: Sequence[int]) -> None:
    """Coded parts one after the other, each in so many bytes."""
    for target, part, wire_format in zip(row.split(widths), parts, formats, strict=True):
        payload = wire.encode_unchecked(part, wire_format)
        target[: payload.numel()] = payload


def _decode(payload: Tensor, wire_format: str, numel: int, out: Tensor | None = None) -> Tensor:
    """Decode numbers from the beginning of some bytes."""
    return wire.decode(payload[: wire.encoded_bytes(numel, wire_format)], wire_format, numel, out=out)


def _chunks(parcels: Sequence[Parcel], most: int) -> Iterator[list[Piece]]:
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


def _sections(pieces: Sequence[Piece]) -> dict[str, list[Piece]]:
    """Pieces of one format side by side."""
    sections: dict[str, list[Piece]] = {}
    for piece in pieces:
        sections.setdefault(piece[0].wire_format, []).append(piece)
    return sections


def _dtype(wire_format: str) -> torch.dtype:
    return torch.float64 if wire_format == "float64" else torch.float32


def _flat(pieces: Sequence[Piece], dtype: torch.dtype) -> Tensor:
    """All numbers of the pieces, in a tensor of their own."""
    return torch.cat([parcel.read(start, stop).to(dtype) for parcel, start, stop in pieces])


def _split(pieces: Sequence[Piece], flat: Tensor) -> Iterator[Tensor]:
    offset = 0
    for _, start, stop in pieces:
        yield flat[offset : offset + stop - start]
        offset += stop - start


def _write(pieces: Sequence[Piece], mean: Tensor, lost: Tensor | None) -> None:
    losses = _split(pieces, lost) if lost is not None else (None for _ in pieces)
    for (parcel, start, stop), part, loss in zip(pieces, _split(pieces, mean), losses, strict=True):
        parcel.write(start, stop, part, loss)


def _check(pieces: Sequence[Piece], mean: Tensor, wire_format: str) -> None:
    """Everybody decoded the same bytes, so that everybody raises, and before anything is written."""
    if wire_format in ("float32", "float64") or bool(torch.isfinite(mean).all()):
        return
    for (parcel, _, _), part in zip(pieces, _split(pieces, mean), strict=True):
        if not bool(torch.isfinite(part).all()):
            raise ValueError(wire.not_codable(parcel.name))
