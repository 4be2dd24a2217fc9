"""Means of payloads, which travel together, whatever their number and formats.

- At full width: one all-reduce of a flat buffer.
- Quantized, up to two replicas: one all-gather. Every replica dequantizes both and takes the mean.
- Quantized, more replicas: an all-to-all, then an all-gather. In the all-to-all each replica receives one shard of the
  numbers of every replica. It takes the shard's mean in float32 and quantizes it, a mean of signs in two bits. The
  all-gather gives all shards to all replicas. No replica receives more than twice the payload, or three times of signs,
  however many replicas there are. (An all-reduce cannot add integers of two bits, and an all-gather alone would grow
  with the number of replicas.) The owner of a shard adds the quantization error of its mean to its own error, once for
  every replica. The mean is therefore exactly the mean of what the replicas count as sent.

The first collective of a quantized mean also carries one byte from each replica: whether all its numbers can be
quantized (``payload_checks.py``). Nothing is written before all replicas have read it.

Buffers larger than a chunk travel a chunk at a time, with so many collectives each.

The mean of a chunk is a generator that starts a collective, yields it, and goes on once the caller has waited for it.
Between the two, a caller may let other work run (``overlap.py``).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.profiler import record_function

from . import quantization
from .chunks import FULL_WIDTH, PayloadSlice, buckets_of, flatten, split_into_chunks, write_back
from .collectives import Collectives
from .mean_record import record_mean
from .payload_checks import PayloadCheck
from .payloads import Payload
from .transfers import Transfer, complete


class PayloadCollectives(Collectives):
    """Collectives that also form the means of payloads."""

    @torch.no_grad()
    def average(self, payloads: Sequence[Payload]) -> None:
        """Replace the tensors of the payloads by their means over the replicas.

        Raises:
            ValueError: A quantized tensor of some replica holds a number that is not finite, or far too large. Raised
                on all replicas, naming the rank and the tensor, before any tensor of any payload has changed. Numbers
                at full width are not checked.
            ReplicaLostError: Another rank has ended, or does not arrive. What has arrived before is taken over.
        """
        try:
            for mean in self.means(payloads):
                complete(mean)
        except BaseException:
            for payload in payloads:
                payload.break_off()
            raise
        for payload in payloads:
            payload.finish()

    def rounds(self, payloads: Sequence[Payload]) -> int:
        """How many collectives the mean of a chunk takes, one after the other."""
        return 2 if self.world_size > 2 and quantized_of(payloads) else 1

    def means(self, payloads: Sequence[Payload], later: bool = False) -> Iterator[Iterator[Transfer]]:
        """The mean of each chunk, which goes on from a collective once its caller has waited for it.

        Call ``finish`` of every payload after all of them have ended.

        Args:
            payloads: They become their means.
            later: Whether other work runs meanwhile. What can be read again from the payloads is not kept then.
        """
        quantized = quantized_of(payloads)
        check = PayloadCheck(quantized) if quantized else None
        for slices in split_into_chunks(payloads, self._chunk):
            yield self.mean_of_chunk(slices, check, later)

    def mean_of_chunk(
        self, slices: Sequence[PayloadSlice], check: PayloadCheck | None, later: bool
    ) -> Iterator[Transfer]:
        """The mean of one chunk.

        Args:
            slices: Of the chunk.
            check: Of all quantized payloads of the mean; ``None`` where there are none.
            later: As for :meth:`means`.
        """
        if check is None:
            return self.mean_by_all_reduce(slices)
        if self.world_size <= 2:
            return self.mean_by_all_gather(slices, check, later)
        return self.mean_by_all_to_all(slices, check, later)

    def bytes_of_chunk(self, slices: Sequence[PayloadSlice], check: PayloadCheck | None, flag: int) -> int:
        """What :meth:`mean_of_chunk` counts as sent, known before it is.

        Args:
            slices: Of the chunk.
            check: As there.
            flag: Bytes of the check that travel with the chunk.
        """
        if check is None:
            width = torch.float64.itemsize if is_wide(slices) else torch.float32.itemsize
            return width * sum(stop - start for _, start, stop in slices)
        several = self.world_size > 2
        buckets = buckets_of(slices, shards=self.world_size if several else 1)
        shard = sum(bucket.width for bucket in buckets) + flag
        return shard * (self.world_size - 1) + sum(bucket.mean_width for bucket in buckets) if several else shard

    @torch.no_grad()
    def mean_by_all_reduce(self, slices: Sequence[PayloadSlice]) -> Iterator[Transfer]:
        """At full width: one all-reduce."""
        flat = flatten(slices, torch.float64 if is_wide(slices) else torch.float32, device=self.device)
        # Divided first: the sum cannot overflow, and equal numbers on 2 or 4 replicas keep their exact value.
        flat.div_(self.world_size)
        yield self.start_all_reduce_sum(flat)
        write_back(slices, flat, None)
        record_mean(
            slices, flat.view(torch.uint8).unsqueeze(0), "float64" if is_wide(slices) else "float32", shards=True
        )

    @torch.no_grad()
    def mean_by_all_gather(
        self, slices: Sequence[PayloadSlice], check: PayloadCheck, later: bool = False
    ) -> Iterator[Transfer]:
        """Quantized, up to two replicas: one all-gather."""
        with record_function("curvadion::quantize"):
            buckets = buckets_of(slices, shards=1)
            flag = check.take_flag()
            own = torch.cat([*(bucket.quantize(release=later)[0] for bucket in buckets), flag])
        widths = [*(bucket.width for bucket in buckets), flag.numel()]
        transfer = self.start_all_gather(own)
        yield transfer
        *gathered, flags = transfer.result.split(widths, dim=1)
        self.verify_flags(flags, check)
        with record_function("curvadion::dequantize"):
            for bucket, packed in zip(buckets, gathered, strict=True):
                received = bucket.dequantize(packed)
                bucket.rows.sub_(received[self.rank])
                mean, *others = received
                for other in others:
                    mean.add_(other)
                bucket.write_back(mean.div_(self.world_size))
                record_mean(bucket.slices, packed, bucket.wire_format, shards=False)

    @torch.no_grad()
    def mean_by_all_to_all(
        self, slices: Sequence[PayloadSlice], check: PayloadCheck, later: bool = False
    ) -> Iterator[Transfer]:
        """Quantized, more replicas: an all-to-all of shards, then an all-gather of their quantized means."""
        with record_function("curvadion::quantize"):
            buckets = buckets_of(slices, shards=self.world_size)
            flag = check.take_flag()
            shards = (bucket.quantize(release=later) for bucket in buckets)
            outgoing = torch.cat([*shards, flag.expand(self.world_size, -1)], dim=1)
        widths = [*(bucket.width for bucket in buckets), flag.numel()]
        transfer = self.start_all_to_all(outgoing)
        yield transfer
        *incoming, flags = transfer.result.split(widths, dim=1)
        self.verify_flags(flags, check)
        with record_function("curvadion::dequantize"):
            means = [bucket.mean(packed, self.rank) for bucket, packed in zip(buckets, incoming, strict=True)]
        with record_function("curvadion::quantize"):
            quantized = (b.quantize_mean(mean, self.rank) for b, mean in zip(buckets, means, strict=True))
            # Nothing, where a chunk consists of the flag alone.
            own = torch.cat([*quantized, flags.new_empty(0)])
        transfer = self.start_all_gather(own)
        yield transfer
        gathered = transfer.result.split([bucket.mean_width for bucket in buckets], dim=1)
        with record_function("curvadion::dequantize"):
            *sent, _ = outgoing.split(widths, dim=1)
            for bucket, packed, mean, packed_means in zip(buckets, sent, means, gathered, strict=True):
                bucket.rows.sub_(bucket.dequantize(packed))
                received = bucket.dequantize_mean(packed_means)
                bucket.rows[self.rank].add_(mean - received[self.rank], alpha=self.world_size)
                bucket.write_back(received)
                record_mean(bucket.slices, packed_means, bucket.mean_format, shards=True)

    def verify_flags(self, flags: Tensor, check: PayloadCheck) -> None:
        """Raise on all replicas where one of them has flagged its payloads."""
        if flags.numel() and bool(flags.any()):
            names = self.all_gather_object(check.first_unusable())
            found = ((self.places[rank], name) for rank, name in enumerate(names) if name is not None)
            place, name = next(found, ("another process", "a parameter's error-feedback residual"))
            raise ValueError(quantization.not_quantizable(f"{place}: {name}"))


def is_wide(slices: Sequence[PayloadSlice]) -> bool:
    """Whether any of the slices must not be rounded to float32."""
    return any(part.payload.wire_format == "float64" for part in slices)


def quantized_of(payloads: Sequence[Payload]) -> list[Payload]:
    """The payloads that are quantized."""
    return [payload for payload in payloads if payload.numel and payload.wire_format not in FULL_WIDTH]
