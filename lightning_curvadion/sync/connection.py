"""Messages from one process to another, beside their process groups. They are bytes: nothing is unpickled."""

from collections.abc import Sequence
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import bytes_of

# Whose stub does not name it.
_dist: Any = dist

# Bytes that are sent at a time: each of them in the timeout of a collective.
AT_A_TIME = 2**20
# Bytes of what is said of tensors or of a mean, at most.
_LONGEST_HEADER = 2**26


class Kind(IntEnum):
    """What a message is: the copy, a mean, that no mean waits to be sent, and the end."""

    COPY = 1
    MEAN = 2
    CAUGHT_UP = 3
    END = 4


class TransferError(RuntimeError):
    """What arrived is not what this replica needs."""


class Connection:
    """Messages between two processes.

    Args:
        store: A connection of this thread's own to the store, which would block others.
        rank: 0 sends and 1 receives.
        timeout: For every megabyte.
    """

    def __init__(self, store: Any, rank: int, timeout: timedelta) -> None:
        self._other = 1 - rank
        self._group = _dist.ProcessGroupGloo(store, rank, 2, timeout)

    def send(self, kind: Kind, header: bytes = b"", body: Sequence[Tensor] = ()) -> None:
        """Send one message; its body is tensors on the CPU."""
        self._send(torch.tensor([kind, len(header), sum(tensor.nbytes for tensor in body)]))
        self._send(torch.frombuffer(bytearray(header or b" "), dtype=torch.uint8)[: len(header)])
        for tensor in body:
            self._send(tensor)

    def _send(self, tensor: Tensor) -> None:
        for part in bytes_of(tensor).split(AT_A_TIME) if tensor.numel() else ():
            self._group.send([part], self._other, 0).wait()

    def receive(self) -> tuple[int, bytes, int]:
        """Kind and header of the next message, and the bytes of its body, which is to be received next."""
        prefix = torch.zeros(3, dtype=torch.int64)
        self.fill(prefix)
        kind, length, size = prefix.tolist()
        if not 0 <= length <= _LONGEST_HEADER:
            raise TransferError(f"a header of {length} bytes arrived")
        header = torch.empty(length, dtype=torch.uint8)
        self.fill(header)
        return kind, bytes(header.numpy()), size

    def fill(self, tensor: Tensor) -> None:
        """Receive a contiguous tensor."""
        for part in bytes_of(tensor).split(AT_A_TIME) if tensor.numel() else ():
            self._group.recv([part], self._other, 0).wait()
