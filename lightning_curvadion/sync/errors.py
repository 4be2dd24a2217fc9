"""What to say when a collective fails because another replica is gone, or does not come."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

# What the backends write; they raise nothing more telling than RuntimeError.
_LATE = ("timed out", "timeout")
_LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "connection refused",
    "socket closed",
    "remote process exited",
    "gloo error",
    "nccl communicator was aborted",
    "ncclremoteerror",
)


class ReplicaLostError(RuntimeError):
    """Another replica died, or stayed away longer than the process group waits: this one cannot go on alone."""


@contextmanager
def meeting(purpose: str) -> Iterator[None]:
    """Say of a collective that fails inside what it was for.

    Args:
        purpose: What the replicas meet for, such as ``"the agreement of a step"``.

    Raises:
        ReplicaLostError: In place of the backend's error, where that is about another replica.
    """
    try:
        yield
    except RuntimeError as error:
        said = str(error).strip()
        if isinstance(error, ReplicaLostError):
            raise
        rank = dist.get_rank() if dist.is_initialized() else 0
        if any(words in said.lower() for words in _LATE):
            raise ReplicaLostError(
                f"rank {rank}: {purpose} timed out: a replica did not come within the process group's timeout"
                f" (the strategy's `timeout`). It is stalled, or lost without closing its connection. ({said})"
            ) from error
        if any(words in said.lower() for words in _LOST):
            raise ReplicaLostError(
                f"rank {rank}: lost a peer during {purpose}: another replica has ended, and its own output says why."
                f" Start again from the newest checkpoint; torchrun --max-restarts does. ({said})"
            ) from error
        raise
