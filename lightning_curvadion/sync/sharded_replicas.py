"""Replicas whose processes hold shards: each process synchronises its own with its counterparts.

The processes i of all replicas hold the same rows of every sharded parameter, so their means need nothing gathered
inside of a replica, and each process sends as much as it holds. Whole tensors, such as buffers, travel as in
``two_levels.py``. What a collective of shards decides, all processes of a replica must decide alike:

- Whether a tensor differs: it does where any of its shards does.
- Whether numbers can be quantized: all of them, on every process.
- Which rows of an embedding have moved: beside the farthest row of any process.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import Self, override

from ..optim.shards import Shards, is_sharded, local_of
from ..optim.shared_work import SharedWork
from .chunks import FULL_WIDTH, split_into_chunks
from .digests import digest
from .inner_shards import InnerShards
from .payload_checks import PayloadCheck
from .payloads import Payload
from .shared_newton_schulz import SharedNewtonSchulz
from .sparse_rows import far_rows
from .transfers import Transfer, differing_in
from .two_levels import InnerProcesses, TwoLevelCollectives


class _InnerCheck(PayloadCheck):
    """A check of shards, of which any process of the replica may hold what cannot be quantized."""

    def __init__(self, payloads: Sequence[Payload], inner: InnerProcesses) -> None:
        super().__init__(payloads)
        self._inner = inner
        self.agree(lambda flag: inner.collectives.maximum_(flag, "the check of what is sent"))

    @override
    def first_unusable(self) -> str | None:
        names = self._inner.host.all_gather_object(super().first_unusable())
        return next((name for name in names if name is not None), None)


class _ShardComparison(Transfer):
    """A comparison of digests, each process's with its counterparts'. Whole tensors become the first process's."""

    def __init__(self, transfer: Transfer, inner: InnerProcesses, tensors: Mapping[str, Tensor]) -> None:
        self.result = transfer.result
        self._transfer, self._inner, self._tensors = transfer, inner, tensors

    @override
    def wait(self) -> Tensor:
        own = self._transfer.wait()
        differs = (own[0] != ~own[1]).to(own.dtype)
        self._inner.collectives.maximum_(differs, "the comparison of digests")
        self.result = torch.stack([differs, ~torch.zeros_like(differs)])
        differing = differing_in(self.result, self._tensors).values()
        self._inner.collectives.broadcast([tensor for tensor in differing if not is_sharded(tensor)])
        return self.result


class ShardedReplicaCollectives(TwoLevelCollectives):
    """Collectives among replicas of several processes, which may hold shards.

    Attributes:
        holds_shards: Whether they do. Without any, these are the collectives of ``two_levels.py``.
    """

    holds_shards = False

    @override
    def in_group_of_its_own(self, backend: str | None = None) -> Self:
        collectives = super().in_group_of_its_own(backend)
        collectives.holds_shards = self.holds_shards
        return collectives

    @override
    def share_work(self) -> SharedWork | None:
        return SharedNewtonSchulz(self._inner) if self._inner.size > 1 else None

    @override
    def hold_shards(self) -> Shards:
        self.holds_shards = True
        return InnerShards(self._inner)

    def _count(self, own: int) -> None:
        """Count bytes of this process together with those of the others of its replica."""
        together = self._inner.host.all_gather(torch.tensor([own], dtype=torch.int64))
        self._sent.total += int(together.sum())

    @override
    def start_comparison(self, tensors: Mapping[str, Tensor], digests: Sequence[Tensor]) -> Transfer:
        if not any(map(is_sharded, tensors.values())):
            return super().start_comparison(tensors, digests)
        own = self.extremes_of(digests)
        self._sent.total += own.nbytes * self._inner.size
        # Whole tensors may differ inside of a replica.
        inside = own.clone()
        self._inner.collectives.maximum_(inside, "the comparison of digests")
        whole = torch.tensor([not is_sharded(tensor) for tensor in tensors.values()], device=own.device)
        own = torch.where(whole, inside, own)
        return _ShardComparison(self._outer.start_maximum_of_digests(own), self._inner, tensors)

    @override
    def joined_inside(self, tensor: Tensor) -> Tensor:
        if not self.holds_shards:
            return tensor
        return self._inner.collectives.all_gather(digest(tensor).view(1).to(device=self.device))

    @override
    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        shards = [tensor for tensor in tensors if is_sharded(tensor)]
        super().broadcast([tensor for tensor in tensors if not is_sharded(tensor)])
        self._outer.broadcast([local_of(shard) for shard in shards])
        self._sent.total += sum(shard.nbytes for shard in shards) if self.rank == 0 else 0

    # -- rows of embeddings ------------------------------------------------------------------------------------------

    @override
    def moved_rows(self, distances: Sequence[Tensor]) -> list[Tensor]:
        if not self.holds_shards or not distances:
            return super().moved_rows(distances)
        for own in distances:
            # A maximum may lose a NaN.
            own.nan_to_num_(nan=torch.inf)
        farthest = torch.stack([own.max() if own.numel() else own.new_zeros(()) for own in distances])
        self._inner.collectives.maximum_(farthest, "the rows that have moved")
        return [far_rows(own, most) for own, most in zip(distances, farthest, strict=True)]

    @override
    def start_all_gather(self, own: Tensor) -> Transfer:
        if not self.holds_shards:
            return super().start_all_gather(own)
        self._count(own.nbytes)
        return self._outer.start_all_gather(own)

    # -- means -------------------------------------------------------------------------------------------------------

    @override
    def rounds(self, payloads: Sequence[Payload]) -> int:
        # A process may hold nothing of what is quantized.
        return 2 if self.world_size > 2 and any(p.wire_format not in FULL_WIDTH for p in payloads) else 1

    @override
    def means(self, payloads: Sequence[Payload], later: bool = False) -> Iterator[Iterator[Transfer]]:
        shards = [payload for payload in payloads if payload.of_shard]
        yield from super().means([payload for payload in payloads if not payload.of_shard], later)
        if not shards:
            return
        quantized = [payload for payload in shards if payload.wire_format not in FULL_WIDTH]
        check = _InnerCheck(quantized, self._inner) if quantized else None
        chunks = list(split_into_chunks(shards, self._chunk))
        if not chunks and check is not None:
            # Its flag travels alone.
            chunks = [[]]
        sizes = (
            self._outer.bytes_of_chunk(chunk, check, flag=int(check is not None and number == 0))
            for number, chunk in enumerate(chunks)
        )
        self._count(sum(sizes))
        for chunk in chunks:
            yield self._outer.mean_of_chunk(chunk, check, later)
