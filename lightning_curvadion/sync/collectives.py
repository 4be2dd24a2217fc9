"""The mean of parcels over the replicas, coded on the way and the same bits on all of them; every collective is here.

Collectives are called through the ``torch.distributed`` module, so that they can be counted from outside. The parcels
of an exchange travel together, whatever their number and their formats:

- All at full width: one all-reduce of one flat buffer.
- Coded, up to two replicas: one all-gather; everybody decodes everything and takes the mean.
- Coded, more replicas: an all-to-all, in which each replica gets one shard of everybody's numbers; it takes the shard's
  mean in float32 and codes that, a mean of signs in two bits; an all-gather brings all shards to all. No replica
  receives more than twice the payload, or three times of signs, however many they are. (An all-reduce cannot add
  integers of two bits, and an all-gather alone would grow with the number of replicas.) What coding the mean loses
  counts as lost by the owner of the shard, as many times as there are replicas, so that the mean is exactly the mean of
  what the replicas are said to have sent.

Buffers larger than a chunk travel a chunk at a time, with so many collectives each.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.profiler import record_function

from .chunks import Piece, chunks_of, joined, sections_of, write
from .errors import meeting
from .payloads import Parcel
from .settings import CHUNK


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
        with meeting("the agreement of a step"):
            dist.all_reduce(signal, op=dist.ReduceOp.MAX, group=self._group)

    def gather(self, own: Tensor) -> Tensor:
        """Everybody's flat tensor, shape (replicas, elements)."""
        gathered = own.new_empty(self.world_size, own.numel())
        self.bytes_sent += own.nbytes
        with record_function("curvadion::exchange"), meeting("an exchange"):
            dist.all_gather(list(gathered), own, group=self._group)
        return gathered

    def gather_objects(self, own: Any) -> list[Any]:
        """Everybody's object, in the order of the ranks; for errors."""
        everyone: list[Any] = [None] * self.world_size
        with meeting("the comparison of models"):
            dist.all_gather_object(everyone, own, group=self._group)
        return everyone

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Rank 0's values for everybody, one collective for each dtype."""
        source = 0 if self._group is None else dist.get_global_rank(self._group, 0)
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            alike = [tensor.detach() for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in alike])
            self.bytes_sent += flat.nbytes if self.rank == 0 else 0
            with meeting("the broadcast of rank 0's values"):
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
        for pieces in chunks_of(parcels, self._chunk):
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
        flat = joined(pieces, torch.float64 if wide else torch.float32)
        # Divided first: the sum cannot overflow, and equal numbers on 2, 3 or 4 replicas keep their exact value.
        flat.div_(self.world_size)
        self.bytes_sent += flat.nbytes
        with record_function("curvadion::exchange"), meeting("an exchange"):
            dist.all_reduce(flat, group=self._group)
        write(pieces, flat, None)

    def exchange_directly(self, pieces: Sequence[Piece]) -> None:
        """Everybody's coded numbers for everybody: one all-gather."""
        with record_function("curvadion::encode"):
            sections = sections_of(pieces, shards=1)
            own = torch.cat([section.encode(section.values) for section in sections])
        gathered = self.gather(own)
        widths = [section.width for section in sections]
        with record_function("curvadion::decode"):
            for section, arrived, sent in zip(sections, gathered.split(widths, dim=1), own.split(widths), strict=True):
                section.take_away(sent.unsqueeze(0))
                section.deliver([section.mean(arrived, shard=0)])

    def exchange_shards(self, pieces: Sequence[Piece]) -> None:
        """A shard of everybody's coded numbers for each, and the coded means for all: all-to-all, then all-gather."""
        with record_function("curvadion::encode"):
            sections = sections_of(pieces, shards=self.world_size)
            rows = [torch.stack([section.encode(shard) for shard in section.shards]) for section in sections]
            outgoing = torch.cat(rows, dim=1)
        incoming = torch.empty_like(outgoing)
        self.bytes_sent += outgoing.nbytes // self.world_size * (self.world_size - 1)
        with record_function("curvadion::exchange"), meeting("an exchange"):
            dist.all_to_all_single(incoming.view(-1), outgoing.view(-1), group=self._group)
        widths = [section.width for section in sections]
        with record_function("curvadion::decode"):
            arrived = incoming.split(widths, dim=1)
            means = [section.mean(payloads, self.rank) for section, payloads in zip(sections, arrived, strict=True)]
        with record_function("curvadion::encode"):
            own = torch.cat([section.encode_mean(mean) for section, mean in zip(sections, means, strict=True)])
        gathered = self.gather(own).split([section.mean_width for section in sections], dim=1)
        with record_function("curvadion::decode"):
            for section, mean, arrived_means, sent in zip(sections, means, gathered, rows, strict=True):
                section.take_away(sent)
                decoded = [section.decode_mean(payload, shard) for shard, payload in enumerate(arrived_means)]
                section.shards[self.rank].add_(mean - decoded[self.rank], alpha=self.world_size)
                section.deliver(decoded)
