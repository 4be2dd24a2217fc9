"""Collectives: every call of ``torch.distributed`` that communicates, and how many bytes each sends.

They are called through the ``torch.distributed`` module, so that they can be counted from outside. What payloads make
of them is in ``payload_collectives.py``.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.profiler import record_function
from typing_extensions import Self

from ..optim.shards import Shards
from ..optim.shared_work import SharedWork
from .chunks import split_tensors
from .digests import digest
from .errors import explain_failure
from .pending_numbers import PendingNumbers
from .row_flags import indices_set_anywhere, packed_flags
from .settings import CHUNK
from .sparse_rows import far_rows
from .transfers import MaximumTransfer, SentBytes, Transfer, differing_in

# So many bytes go from each replica to each other one. Of more, gloo's ring makes better use of a link: two replicas
# that send to each other at once partly take turns.
DIRECT_BYTES = 2**15


class Collectives:
    """Collectives of one process group, with a count of the bytes sent.

    Args:
        group: Process group; ``None`` is the default group.
        chunk: Numbers that are quantized, sent and dequantized at a time.
        sent: Counts the bytes; ``None`` for a count of their own.

    Attributes:
        rank: This replica.
        world_size: Number of replicas.
        device: Where collectives take place; ``None`` for where their tensors are.
        places: What errors call the replicas.
    """

    def __init__(self, group: ProcessGroup | None = None, chunk: int = CHUNK, sent: SentBytes | None = None) -> None:
        self._sent = sent or SentBytes()
        self.rank = 0
        self.world_size = 1
        # NCCL carries tensors of the GPU only, and a module may keep a buffer on the CPU.
        self.device: torch.device | None = None
        self.places = ["rank 0"]
        # Of a group that is not the default one.
        self._ranks: list[int] = []
        self._sends_to_each = False
        self._group = group
        self._chunk = chunk

    def join(self, device: torch.device | None = None) -> None:
        """Read rank and world size from the process group, which must be initialised by now.

        Args:
            device: Of the parameters.
        """
        self.device = device
        self.rank, self.world_size = dist.get_rank(self._group), dist.get_world_size(self._group)
        self.places = [f"rank {rank}" for rank in range(self.world_size)]
        if self._group is not None:
            self._ranks = dist.get_process_group_ranks(self._group)

    def send_to_each(self) -> None:
        """Let each replica send few bytes that all are to know to each other one, where gloo would use a ring.

        A ring takes a round trip for each replica, and this takes one (``examples/benchmarks/latency.py``); the link
        carries the headers of more messages. Every rank calls it.
        """
        self._sends_to_each = self.backend == "gloo"

    @property
    def bytes_sent(self) -> int:
        """Payload of this replica so far, in all process groups that share the count.

        An all-reduce of n bytes counts n, an all-gather this replica's share, an all-to-all of shards what goes to
        other replicas, a broadcast counts at its source. The mean of a quantized tensor of n bytes thus counts n,
        however many replicas there are.
        """
        return self._sent.total

    @property
    def group(self) -> ProcessGroup | None:
        """The process group; ``None`` is the default group."""
        return self._group

    def in_group_of_its_own(self, backend: str | None = None) -> Self:
        """Collectives of the same ranks in another process group, for those that run beside others.

        Args:
            backend: Of the group; ``None`` for the backend of this one.
        """
        if self._group is not None:
            self._make_as_many_groups()
        group = dist.new_group(
            dist.get_process_group_ranks(self._present),
            timeout=self.timeout,
            backend=backend or self.backend,
            # Ranks outside of a subgroup do not call this.
            use_local_synchronization=self._group is not None,
        )
        collectives = type(self)(group, self._chunk, self._sent)
        collectives.join(self.device)
        if self._sends_to_each:
            collectives.send_to_each()
        return collectives

    def among(self, ranks: Sequence[int]) -> Self:
        """Collectives of some of the ranks. Every rank of the default group calls it, and the others leave them alone.

        Raises:
            ReplicaLostError: Another rank has ended.
        """
        with self._explained("the forming of a group"):
            group = dist.new_group(list(ranks), timeout=self.timeout)
        collectives = type(self)(group, self._chunk, self._sent)
        if self.rank in ranks:
            collectives.join(self.device)
        return collectives

    @property
    def _present(self) -> ProcessGroup:
        present = self._group or dist.group.WORLD
        assert present is not None, "joined"
        return present

    @property
    def timeout(self) -> timedelta | None:
        """Of a collective; ``None`` where the backend has its default alone."""
        options = self._present._get_backend(self._present._device_types[0]).options
        return options._timeout if options is not None else None

    def _make_as_many_groups(self) -> None:
        """Let all ranks have made as many process groups: by their number torch names the next one of a subgroup."""
        made = len(dist.distributed_c10d._world.pg_names)
        most = int(self.all_gather(torch.tensor([made], device=self.device)).max())
        for _ in range(most - made):
            dist.new_group([dist.get_rank()], use_local_synchronization=True)

    @property
    def backend(self) -> str:
        """Name of the process group's backend, such as ``"gloo"``."""
        return dist.get_backend(self._group)

    def _explained(self, purpose: str) -> AbstractContextManager[None]:
        return explain_failure(purpose, self._ranks)

    def start_all_reduce_max(self, message: Tensor, purpose: str) -> PendingNumbers:
        """Start the element-wise maximum of a few numbers over the replicas, for the host to read later.

        Args:
            message: Of one size on every rank; nobody else may use the tensor.
            purpose: What the collective is for, in an error.
        """
        return PendingNumbers(*self._start_maximum(message, purpose), purpose, self._ranks)

    def _start_maximum(self, message: Tensor, purpose: str) -> tuple[dist.Work, Tensor]:
        """A collective, and what it writes: tensors of the message's shape, of which the maximum is wanted."""
        self._sent.total += message.nbytes
        with self._explained(purpose):
            if self._goes_to_each(message):
                return self._start_gather(message)
            work = dist.all_reduce(message, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return work, message.unsqueeze(0)

    def _goes_to_each(self, own: Tensor) -> bool:
        return self._sends_to_each and own.nbytes <= DIRECT_BYTES

    def _start_gather(self, own: Tensor) -> tuple[dist.Work, Tensor]:
        r"""A collective, and what it writes: the tensor of every replica, shape (replicas, \*shape)."""
        gathered = own.new_empty(self.world_size, *own.shape)
        if self._goes_to_each(own):
            outgoing = own.expand_as(gathered).contiguous().view(-1)
            work = dist.all_to_all_single(gathered.view(-1), outgoing, group=self._group, async_op=True)
        else:
            work = dist.all_gather(list(gathered), own, group=self._group, async_op=True)
        return work, gathered

    def maximum_(self, message: Tensor, purpose: str) -> None:
        """Replace some numbers by their element-wise maximum. On a GPU the host does not wait for it."""
        self._sent.total += message.nbytes
        with self._explained(purpose):
            dist.all_reduce(message, op=dist.ReduceOp.MAX, group=self._group)

    def differing(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of the tensors whose bits are not the same on all replicas. Sends 16 bytes a tensor.

        Args:
            tensors: By name, the same names on every rank.
        """
        return self.where_digests_differ(tensors, [digest(tensor) for tensor in tensors.values()])

    def where_digests_differ(self, tensors: Mapping[str, Tensor], digests: Sequence[Tensor]) -> dict[str, Tensor]:
        """Those of the tensors whose digests, taken before, are not the same on all replicas."""
        if not tensors or self.world_size == 1:
            return {}
        return differing_in(self.start_comparison(tensors, digests).wait(), tensors)

    def start_comparison(self, tensors: Mapping[str, Tensor], digests: Sequence[Tensor]) -> Transfer:
        """Start to compare the digests of tensors, for :func:`~lightning_curvadion.sync.transfers.differing_in`."""
        return self.start_maximum_of_digests(self.extremes_of(digests))

    def extremes_of(self, digests: Sequence[Tensor]) -> Tensor:
        """Digests and their complements, shape (2, tensors): the maximum of the latter is that of the minimum."""
        own = torch.stack([digest.to(device=self.device) for digest in digests])
        return torch.stack([own, ~own])

    def start_maximum_of_digests(self, extremes: Tensor) -> Transfer:
        """Start the maximum of :meth:`extremes_of` over the replicas."""
        purpose = "the comparison of digests"
        return MaximumTransfer(*self._start_maximum(extremes, purpose), purpose, self._ranks)

    def start_all_reduce_sum(self, flat: Tensor) -> Transfer:
        """Start to replace ``flat`` by its sum over the replicas."""
        self._sent.total += flat.nbytes
        with self._explained("an all-reduce"):
            work = dist.all_reduce(flat, group=self._group, async_op=True)
        return Transfer(work, flat, "an all-reduce", self._ranks)

    def start_all_to_all(self, outgoing: Tensor) -> Transfer:
        """Row k of replica i becomes row i of replica k; shape (replicas, elements)."""
        incoming = torch.empty_like(outgoing)
        self._sent.total += outgoing.nbytes // self.world_size * (self.world_size - 1)
        with self._explained("an all-to-all"):
            work = dist.all_to_all_single(incoming.view(-1), outgoing.view(-1), group=self._group, async_op=True)
        return Transfer(work, incoming, "an all-to-all", self._ranks)

    def all_to_all_of_bytes(self, outgoing: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Flat bytes for each process, one after the other, become those from each process.

        Args:
            outgoing: uint8.
            sent: How many go to each process.
            received: How many come from each process.
        """
        incoming = outgoing.new_empty(sum(received))
        self._sent.total += outgoing.numel()
        with record_function("curvadion::collective"), self._explained("an all-to-all"):
            dist.all_to_all_single(incoming, outgoing, list(received), list(sent), group=self._group)
        return incoming

    def start_all_gather(self, own: Tensor) -> Transfer:
        """The flat tensor of every replica, shape (replicas, elements)."""
        self._sent.total += own.nbytes
        with self._explained("an all-gather"):
            return Transfer(*self._start_gather(own), "an all-gather", self._ranks)

    def all_gather(self, own: Tensor) -> Tensor:
        """The flat tensor of every replica, shape (replicas, elements)."""
        return self.start_all_gather(own).wait()

    def all_processes(self, own: Tensor) -> Tensor:
        """The flat tensor of every process, shape (processes, elements)."""
        return self.all_gather(own)

    def moved_rows(self, distances: Sequence[Tensor]) -> list[Tensor]:
        """Masks of the rows that have moved on this replica, by how far: see ``sparse_rows.py``."""
        return [far_rows(own) for own in distances]

    def rows_to_send(self, distances: Sequence[Tensor]) -> list[Tensor]:
        """The indices of the rows that have moved on any replica, given how far each has on this one."""
        return self.set_anywhere(self.moved_rows(distances))

    def set_anywhere(self, masks: Sequence[Tensor]) -> list[Tensor]:
        """The indices at which a mask is set on any replica, for each of some flat masks. A flag travels as one bit."""
        return indices_set_anywhere(self.all_gather(packed_flags(masks)), masks)

    @property
    def place_inside(self) -> tuple[int, int]:
        """This process among those of its replica, and their number."""
        return 0, 1

    def share_work(self) -> SharedWork | None:
        """The processes of this replica, where it has several that hold the same parameters."""
        return None

    def hold_shards(self) -> Shards:
        """Let tensors be sharded over the processes of a replica.

        Raises:
            ValueError: It is one process.
        """
        raise ValueError("sharded parameters need an inner_group")

    def joined_inside(self, tensor: Tensor) -> Tensor:
        """What all processes of a replica know of a tensor of which each may hold a part, for a comparison."""
        return tensor

    def anywhere_inside(self, flag: bool) -> bool:
        """Whether a flag is set on any process of this replica."""
        return flag

    def all_gather_object(self, own: Any) -> list[Any]:
        """The strings, numbers or lists of every process, by rank. For errors: their bytes are not counted."""
        with self._explained("the comparison of the replicas' models"):
            return all_gather_plain(own, self.device or torch.device("cpu"), self._group)

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Set tensors to rank 0's values. Bytes travel, so that any dtype can: four for each number of a chunk."""
        for parts in split_tensors(tensors, torch.float32.itemsize * self._chunk):
            own = [bytes_of(part) for part in parts]
            travelling = [part_bytes.to(device=self.device) for part_bytes in own]
            # A contiguous tensor that travels alone is its own buffer.
            flat = torch.cat(travelling) if len(own) > 1 else travelling[0]
            self.broadcast_bytes(flat)
            for part, part_bytes, received in zip(parts, own, flat.split([b.numel() for b in own]), strict=True):
                if flat is not own[0]:
                    part_bytes.copy_(received)
                if not part.is_contiguous():
                    part.copy_(part_bytes.view(part.dtype).view(part.shape))

    def broadcast_bytes(self, flat: Tensor) -> None:
        """Replace a flat tensor of bytes by rank 0's."""
        source = 0 if self._group is None else dist.get_global_rank(self._group, 0)
        self._sent.total += flat.nbytes if self.rank == 0 else 0
        with record_function("curvadion::collective"), self._explained("the broadcast of rank 0's values"):
            dist.broadcast(flat, src=source, group=self._group)


def bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, flat: a view of it if it is contiguous, a copy otherwise."""
    # A last dimension of one element has stride 1, which a view of bytes needs; that of a tensor of one need not.
    return tensor.contiguous().unsqueeze(-1).view(torch.uint8).view(-1)


# -- of the default process group, and of objects ----------------------------------------------------------------------


def meet(what: str) -> None:
    """Wait until all ranks are here.

    Args:
        what: They wait for, for the error.

    Raises:
        ReplicaLostError: Another rank has ended, or does not arrive.
    """
    with explain_failure(what):
        dist.barrier()


def all_gather_plain(own: Any, device: torch.device, group: ProcessGroup | None = None) -> list[Any]:
    """The object of every process, by rank. It travels as JSON: nothing that arrives is unpickled.

    Args:
        own: What JSON can say.
        device: Of the collectives.
        group: ``None`` for the default process group.
    """
    text = _bytes_of(own, device)
    size = dist.get_world_size(group)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([text.numel()], device=device), group=group)
    longest = max(int(length) for length in lengths)
    texts = [text.new_empty(longest) for _ in range(size)]
    dist.all_gather(texts, torch.cat([text, text.new_zeros(longest - text.numel())]), group=group)
    return [_object_of(text[: int(length)]) for text, length in zip(texts, lengths, strict=True)]


def broadcast_plain(own: Any, source: int, device: torch.device) -> Any:
    """The object of one rank of the default process group, on all of them.

    Raises:
        TypeError: JSON cannot say it.
    """
    text = _bytes_of(own, device) if dist.get_rank() == source else torch.empty(0, dtype=torch.uint8, device=device)
    length = torch.tensor([text.numel()], device=device)
    dist.broadcast(length, source)
    if dist.get_rank() != source:
        text = text.new_empty(int(length))
    dist.broadcast(text, source)
    return own if dist.get_rank() == source else _object_of(text)


def _bytes_of(plain: Any, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(plain).encode()), dtype=torch.uint8).to(device)


def _object_of(text: Tensor) -> Any:
    return json.loads(bytes(text.cpu().numpy()))


def count_together(name: str, amount: int) -> int:
    """Add to a counter in the store of the default process group; the sum over all ranks so far."""
    return dist.distributed_c10d._get_default_store().add(f"curvadion/{name}", amount)
