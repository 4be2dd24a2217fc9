"""PendingNumbers: a few numbers that a collective is still computing, on their way to the host."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import explain_failure

# One for all numbers of a device: they are few, and copied in the order in which they were started.
_streams: dict[torch.device, torch.cuda.Stream] = {}


class PendingNumbers:
    """The result of a small collective, which the host reads later.

    On a GPU they are copied as soon as they have arrived, on a stream of their own. The host then waits for them alone,
    and for nothing that was started since.

    Args:
        work: The collective.
        numbers: What it writes, of which the element-wise maximum over the first dimension is meant; nobody else may
            use the tensor.
        purpose: What the collective is for, in an error.
        ranks: Of its process group; none for all.
    """

    def __init__(self, work: dist.Work, numbers: Tensor, purpose: str, ranks: Sequence[int] = ()) -> None:
        self._work, self._numbers, self._purpose = work, numbers, purpose
        self._ranks = ranks
        self._copied: torch.cuda.Event | None = None
        # Where tensors are traced they may be on a GPU that is not there.
        if numbers.device.type == "cuda" and torch.cuda.is_available():
            with explain_failure(purpose, ranks), torch.cuda.stream(_stream_of(numbers.device)):
                work.wait()
                self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=True)
                self._numbers.copy_(numbers, non_blocking=True)
                self._copied = torch.cuda.Event()
                self._copied.record()
            # The allocator must not give the memory away before the copy has read it.
            numbers.record_stream(_stream_of(numbers.device))

    def has_arrived(self) -> bool:
        """Whether :meth:`read` would not wait."""
        return self._copied.query() if self._copied is not None else self._work.is_completed()

    def read(self) -> list[float]:
        """Wait for the numbers.

        Raises:
            ReplicaLostError: Another rank has ended, or does not arrive.
        """
        with explain_failure(self._purpose, self._ranks):
            if self._copied is not None:
                self._copied.synchronize()
            else:
                self._work.wait()
            return cast(list[float], self._numbers.amax(dim=0).tolist())


def _stream_of(device: torch.device) -> Any:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
