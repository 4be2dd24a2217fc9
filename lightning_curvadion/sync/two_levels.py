"""Two levels: several processes form a replica, and every replica sends what one process alone would.

Inside a replica the link is fast, and gradients are averaged at every step. Its processes therefore hold the same bits,
and what one of them knows, all know. Between replicas, process i talks to its counterparts, the processes i of the
other replicas:

- Small things, such as agreements and digests, the first process exchanges. It then tells the others of its replica.
- A mean: process i sends the i-th part of every payload, in the wire format. All parts travel at once, then every
  process tells the others the means of its part. So all processes share the work of quantization and the card, and each
  takes over the same numbers.

The sender of an element stores its error-feedback residual. It is the same at every sync step (``Payload.share``).

Of a tensor that differs inside of a replica, as buffers do under ``DistributedDataParallel``, the first process's
values count.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from typing_extensions import Self, override

from .chunks import PayloadSlice, split_slices
from .collectives import Collectives
from .errors import lost_replica
from .payload_checks import PayloadCheck
from .payload_collectives import PayloadCollectives, is_wide, quantized_of
from .payloads import Payload
from .pending_numbers import PendingNumbers
from .sparse_rows import far_rows
from .transfers import SentBytes, Transfer, differing_in


class InnerProcesses:
    """The processes of one replica.

    Args:
        group: Their process group.
        chunk: Numbers that travel at a time.

    Attributes:
        collectives: Of the group.
        host: Of the same processes on the CPU, for numbers that the host reads: it waits for nothing that the device
            does. They exist once the processes have joined.
    """

    def __init__(self, group: ProcessGroup, chunk: int) -> None:
        self.collectives = Collectives(group, chunk)
        self.host = self.collectives

    def join(self, device: torch.device | None) -> None:
        """Read rank and size from the process group, which must be initialised by now."""
        self.collectives.join(device)
        if self.host is self.collectives:
            self.host = self.collectives.in_group_of_its_own(backend="gloo")
            self.host.join()

    @property
    def rank(self) -> int:
        """This process."""
        return self.collectives.rank

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.collectives.world_size

    @property
    def is_first(self) -> bool:
        """Whether this process exchanges small things for all."""
        return self.rank == 0


class ToldNumbers(PendingNumbers):
    """A few numbers that the first process is receiving; it tells the others when they are read.

    Args:
        pending: Of the first process.
        count: How many numbers.
        inner: The processes of the replica.
        purpose: What the collective is for, in an error.
    """

    def __init__(self, pending: PendingNumbers | None, count: int, inner: InnerProcesses, purpose: str) -> None:
        self._pending, self._count, self._inner, self._purpose = pending, count, inner, purpose

    @override
    def read(self) -> list[float]:
        # First of all whether they have arrived: otherwise the others would wait.
        told = torch.zeros(1 + self._count, dtype=torch.float64)
        try:
            if self._pending is not None:
                told = torch.tensor([1.0, *self._pending.read()], dtype=torch.float64)
        finally:
            self._inner.host.broadcast_bytes(told.view(torch.uint8))
        arrived, *numbers = told.tolist()
        if not arrived:
            raise lost_replica(self._purpose)
        return numbers


class ToldTransfer(Transfer):
    """A collective of the first process, which tells the others the result when it is waited for.

    Args:
        transfer: Of the first process.
        result: Of the shape and dtype of the result, on the others.
        inner: The processes of the replica.
        compared: Tensors whose comparison it is. Those that differ anywhere become the first process's.
    """

    def __init__(
        self,
        transfer: Transfer | None,
        result: Tensor,
        inner: InnerProcesses,
        compared: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.result = result
        self._transfer, self._inner, self._compared = transfer, inner, compared

    @override
    def wait(self) -> Tensor:
        if self._transfer is not None:
            self.result = self._transfer.wait()
        self._inner.collectives.broadcast([self.result])
        if self._compared is not None:
            self._inner.collectives.broadcast(list(differing_in(self.result, self._compared).values()))
        return self.result


class _NothingUnderWay(Transfer):
    """In place of a collective, for a process that has no part in it."""

    def __init__(self) -> None:
        self.result = torch.empty(0)

    @override
    def wait(self) -> Tensor:
        return self.result


class _OwnPart(Payload):
    """A slice of a payload that this process sends. It keeps the mean, which is written once all processes know it."""

    def __init__(self, part: PayloadSlice) -> None:
        super().__init__(part.payload.name, part.stop - part.start, part.payload.wire_format)
        self._part = part
        self.mean = torch.empty(0)
        self.error: Tensor | None = None

    @override
    def read(self, start: int, stop: int) -> Tensor:
        return self._part.payload.read(self._part.start + start, self._part.start + stop)

    @override
    def write(self, start: int, stop: int, mean: Tensor, error: Tensor | None) -> None:
        self.mean, self.error = mean, error

    def told(self) -> list[Tensor]:
        """What the other processes must know."""
        if not self._part.payload.needs_own_error:
            return [self.mean]
        assert self.error is not None, "a quantized payload"
        return [self.mean, self.error]


class TwoLevelCollectives(PayloadCollectives):
    """Collectives among replicas of several processes, with the interface of those among processes.

    Every process of every replica calls them. ``rank`` and ``world_size`` are those of replicas, and so are the bytes
    counted: all processes of a replica count what they send together.

    Args:
        group: This process and its counterparts.
        inner: The processes of this replica.
        chunk: Numbers that each process quantizes and sends at a time.
        sent: Counts the bytes; ``None`` for a count of their own.
    """

    def __init__(self, group: ProcessGroup, inner: InnerProcesses, chunk: int, sent: SentBytes | None = None) -> None:
        super().__init__(group, chunk, sent)
        self._inner = inner
        # Their count is that of this process alone, which nobody reads.
        self._outer = PayloadCollectives(group, chunk)

    @override
    def join(self, device: torch.device | None = None) -> None:
        self._inner.join(device)
        self._join_counterparts(device)
        ranks = self.all_gather_object(dist.get_rank())
        size = self._inner.size
        self.places = [
            f"replica {replica} ({_ranks(ranks[replica * size : (replica + 1) * size])})"
            for replica in range(self.world_size)
        ]
        self._outer.places = self.places

    def _join_counterparts(self, device: torch.device | None) -> None:
        super().join(device)
        self._outer.join(device)

    @override
    def in_group_of_its_own(self, backend: str | None = None) -> Self:
        group = self._outer.in_group_of_its_own(backend).group
        assert group is not None
        collectives = type(self)(group, self._inner, self._chunk, self._sent)
        collectives._join_counterparts(self.device)
        collectives.places = collectives._outer.places = self.places
        if self._sends_to_each:
            collectives.send_to_each()
        return collectives

    @override
    def send_to_each(self) -> None:
        super().send_to_each()
        self._outer.send_to_each()

    # -- by the first process ----------------------------------------------------------------------------------------

    @override
    def start_all_reduce_max(self, message: Tensor, purpose: str) -> PendingNumbers:
        self._sent.total += message.nbytes
        # A stop request may be one process's alone.
        self._inner.collectives.maximum_(message, purpose)
        pending = self._outer.start_all_reduce_max(message, purpose) if self._inner.is_first else None
        return ToldNumbers(pending, message.numel(), self._inner, purpose)

    @override
    def where_digests_differ(self, tensors: Mapping[str, Tensor], digests: Sequence[Tensor]) -> dict[str, Tensor]:
        # Also where there is one replica, whose processes may differ.
        return differing_in(self.start_comparison(tensors, digests).wait(), tensors) if tensors else {}

    @override
    def start_comparison(self, tensors: Mapping[str, Tensor], digests: Sequence[Tensor]) -> Transfer:
        """As among processes. What differs inside of one replica differs, for all of them."""
        extremes = self.extremes_of(digests)
        self._sent.total += extremes.nbytes
        self._inner.collectives.maximum_(extremes, "the comparison of digests")
        started = self._outer.start_maximum_of_digests(extremes) if self._inner.is_first else None
        return ToldTransfer(started, extremes, self._inner, tensors)

    @override
    def start_all_gather(self, own: Tensor) -> Transfer:
        self._sent.total += own.nbytes
        started = self._outer.start_all_gather(own) if self._inner.is_first else None
        return ToldTransfer(started, own.new_empty(self.world_size, own.numel()), self._inner)

    @override
    def all_processes(self, own: Tensor) -> Tensor:
        of_replica = self._inner.collectives.all_gather(own)
        return self.all_gather(of_replica.view(-1)).view(-1, own.numel())

    @override
    def all_gather_object(self, own: Any) -> list[Any]:
        of_replica = self._inner.host.all_gather_object(own)
        everyone = self._outer.all_gather_object(of_replica) if self._inner.is_first else None
        # The first process's; the others send nothing of size.
        told = self._inner.host.all_gather_object(everyone)[0]
        return list(itertools.chain.from_iterable(told))

    @override
    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        if self._inner.is_first:
            self._outer.broadcast(tensors)
        self._inner.collectives.broadcast(tensors)
        self._sent.total += sum(tensor.nbytes for tensor in tensors) if self.rank == 0 else 0

    @property
    @override
    def place_inside(self) -> tuple[int, int]:
        return self._inner.rank, self._inner.size

    @override
    def anywhere_inside(self, flag: bool) -> bool:
        flags = torch.tensor([float(flag)])
        self._inner.host.maximum_(flags, "an agreement inside of a replica")
        return bool(flags.item())

    # -- by all processes --------------------------------------------------------------------------------------------

    @override
    def moved_rows(self, distances: Sequence[Tensor]) -> list[Tensor]:
        """As among processes. Each process knows how far its share of the rows has moved, and 0 of the others."""
        for own in distances:
            # A maximum may lose a NaN.
            own.nan_to_num_(nan=torch.inf)
            self._inner.collectives.maximum_(own, "the rows that have moved")
        return [far_rows(own) for own in distances]

    @override
    def means(self, payloads: Sequence[Payload], later: bool = False) -> Iterator[Iterator[Transfer]]:
        quantized = quantized_of(payloads)
        check = PayloadCheck(quantized) if quantized else None
        if check is not None:
            # Of all processes, so that none goes on where another one raises.
            check.agree(lambda flag: self._inner.collectives.maximum_(flag, "the check of what is sent"))
        chunks_of = [
            list(split_slices([PayloadSlice(p, *p.share(process, self._inner.size)) for p in payloads], self._chunk))
            for process in range(self._inner.size)
        ]
        for number, chunks in enumerate(itertools.zip_longest(*chunks_of, fillvalue=())):
            flag = int(check is not None and number == 0)
            self._sent.total += sum(self._outer.bytes_of_chunk(chunk, check, flag) for chunk in chunks)
            yield self._mean_of_chunks(chunks, check, flag, self.rounds(payloads), later)

    @torch.no_grad()
    def _mean_of_chunks(
        self,
        chunks: Sequence[Sequence[PayloadSlice]],
        check: PayloadCheck | None,
        flag: int,
        rounds: int,
        later: bool,
    ) -> Iterator[Transfer]:
        """The mean of one chunk of each process, known to all of them before any writes it.

        Args:
            chunks: By process; a process may have none left.
            check: Of all quantized payloads.
            flag: Bytes of the check that travel with this chunk, with an empty one too.
            rounds: How many collectives the mean of a chunk takes.
            later: As for :meth:`means`.
        """
        parts = [_OwnPart(part) for part in chunks[self._inner.rank]]
        if parts or flag:
            yield from self._outer.mean_of_chunk([PayloadSlice(p, 0, p.numel) for p in parts], check, later)
        else:
            yield from (_NothingUnderWay() for _ in range(rounds))
        told = self._tell([tensor for part in parts for tensor in part.told()], chunks)
        for process, (chunk, numbers) in enumerate(zip(chunks, told, strict=True)):
            for position, (payload, start, stop) in enumerate(chunk):
                mean, numbers = numbers.tensor_split([stop - start])
                error = parts[position].error if process == self._inner.rank else None
                if payload.needs_own_error:
                    error, numbers = numbers.tensor_split([stop - start])
                payload.write(start, stop, mean, error)

    def _tell(self, own: Sequence[Tensor], chunks: Sequence[Sequence[PayloadSlice]]) -> Tensor:
        """What every process tells the others of its chunk: shape (processes, elements), the shorter filled up."""
        longest = max(sum((stop - start) * (1 + p.needs_own_error) for p, start, stop in chunk) for chunk in chunks)
        dtype = torch.float64 if any(is_wide(chunk) for chunk in chunks) else torch.float32
        # A chunk may hold payloads of more than one device.
        device = self.device or next(payload.sources[0].device for chunk in chunks for payload, *_ in chunk)
        flat = torch.zeros(longest, dtype=dtype, device=device)
        if own:
            numbers = torch.cat([tensor.to(device=device, dtype=dtype) for tensor in own])
            flat[: numbers.numel()] = numbers
        return self._inner.collectives.all_gather(flat)


def _ranks(ranks: Sequence[int]) -> str:
    """Ranks of one replica in words.

    Example:
        >>> _ranks([4]), _ranks([4, 5]), _ranks([4, 5, 6])
        ('rank 4', 'ranks 4 and 5', 'ranks 4 to 6')
    """
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {ranks[0]} {'and' if len(ranks) == 2 else 'to'} {ranks[-1]}"
