"""Records of means: the packed bytes by which anchors move, so that another process can move its own by the same bits.

A replica that comes has a copy of the anchors that is some steps old. It replays the means since then.
"""

import json
import queue
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import quantization
from .chunks import PayloadSlice


class Record(NamedTuple):
    """The mean of some slices of payloads.

    Attributes:
        header: JSON: what the body holds.
        body: uint8: of each slice of sparse rows their indices, then the packed numbers.
    """

    header: bytes
    body: Tensor


class MeanRecorder:
    """Collects records on the replica that hands them on, while another thread sends them.

    Args:
        numbers: Of the parameters whose anchors are followed.
        most_bytes: So much may wait to be sent. A new copy of the anchors costs less than more.

    Attributes:
        identity: A number that no other recorder has.
        count: How many records there are so far.
        closed: Whether nothing more is recorded.
    """

    def __init__(self, numbers: Mapping[Tensor, int], most_bytes: int) -> None:
        self.identity = random.SystemRandom().randrange(1, 2**62)
        self.count = 0
        self.closed = False
        self._numbers, self._most_bytes = numbers, most_bytes
        self._queue: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
        self._waiting_bytes = 0
        self._given_up = False

    def note(self, slices: Sequence[PayloadSlice], packed: Tensor, wire_format: str, shards: bool) -> None:
        """Record a mean that was taken over.

        Args:
            slices: Their numbers follow each other.
            packed: Packed rows.
            wire_format: Their format.
            shards: Whether the rows are parts of the mean, and not numbers of each replica.
        """
        if self.closed:
            return
        described: list[list[int]] = []
        indices: list[Tensor] = []
        for payload, start, stop in slices:
            number = self._numbers.get(payload.origin[1], -1) if payload.origin is not None else -1
            rows, (first, last) = payload.rows_between(start, stop)
            if rows is not None:
                indices.append(rows.to("cpu", torch.int64))
            described.append([number, first, last, -1 if rows is None else len(rows)])
        header = {"slices": described, "format": wire_format, "shards": shards, "rows": len(packed)}
        parts = [part.contiguous().view(torch.uint8).view(-1) for part in [*indices, packed.to("cpu", copy=True)]]
        body = torch.cat(parts)
        self.count += 1
        self._waiting_bytes += body.numel()
        self._queue.put(Record(json.dumps(header).encode(), body))
        if self._waiting_bytes > self._most_bytes:
            self._given_up = True
            self.close()

    def close(self) -> None:
        """Record no more."""
        if not self.closed:
            self.closed = True
            self._queue.put(None)

    def is_empty(self) -> bool:
        """Whether no record waits to be sent."""
        return self._queue.empty()

    def take(self, seconds: float) -> Record | None:
        """The next record; ``None`` after the last one, and where too much waits to be sent.

        Raises:
            queue.Empty: None came in time.
        """
        record = None if self._given_up else self._queue.get(timeout=seconds)
        self._waiting_bytes -= record.body.numel() if record is not None else 0
        return record


def record_mean(slices: Sequence[PayloadSlice], packed: Tensor, wire_format: str, shards: bool) -> None:
    """Record a mean where the anchors of its parameters are followed; see :meth:`MeanRecorder.note`."""
    origins = (part.payload.origin for part in slices)
    recorder = next((origin[0].recorder for origin in origins if origin is not None), None)
    if recorder is not None:
        recorder.note(slices, packed, wire_format, shards)


def replay(record: Record, anchors: Sequence[Tensor]) -> None:
    """Move anchors by a recorded mean.

    Args:
        record: It may come from anywhere.
        anchors: By number, contiguous, on the CPU.

    Raises:
        ValueError: The record is none of these anchors.
    """
    header: dict[str, Any] = json.loads(record.header)
    slices, wire_format = header["slices"], header["format"]
    if wire_format not in (*quantization.wire_formats(), "float64"):
        raise ValueError(f"a mean in the unknown format {wire_format!r} arrived")
    body, indices = record.body, []
    for *_, rows in slices:
        count = 8 * max(0, rows)
        indices.append(body[:count].clone().view(torch.int64))
        body = body[count:]
    packed = body.view(header["rows"], -1)
    form = quantization.format_of(wire_format)
    dtype = torch.float64 if wire_format == "float64" else torch.float32
    out = torch.empty(len(packed), packed.shape[1] // form.block_bytes * form.block, dtype=dtype)
    numbers = quantization.dequantize_rows(packed.contiguous(), wire_format, out)
    if not header["shards"]:
        # In the order of ``PayloadCollectives.mean_by_all_gather``, for the same bits.
        numbers, *others = numbers
        for other in others:
            numbers.add_(other)
        numbers.div_(len(packed))
    flat = numbers.reshape(-1)
    for (number, start, stop, rows), index in zip(slices, indices, strict=True):
        part, flat = flat[: stop - start], flat[stop - start :]
        if number < 0:
            continue
        anchor = anchors[number]
        if rows < 0:
            anchor.view(-1)[start:stop].add_(part)
            continue
        moved = anchor[index]
        moved.view(-1)[start:stop].add_(part)
        anchor[index] = moved
