"""The error of a collective that fails because another rank has ended or does not arrive."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

# The backends raise RuntimeError for everything; only the text says why. "ncclSystemError" alone is none of these: it
# may as well be full shared memory on this machine.
_TIMEOUTS = ("timed out", "timeout")
_LOST_CONNECTIONS = (
    "connection closed by peer",
    "connection closed by remote peer",
    "connection was likely closed",
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
    """Another rank has ended, or did not arrive within the process group's timeout: this rank cannot go on alone."""


class UnevenBatchesError(RuntimeError):
    """Some ranks have run out of batches while others train on; raised on all of them."""


@contextmanager
def explain_failure(collective: str) -> Iterator[None]:
    """Turn the backend's error of a lost or stalled rank into one that says what to do.

    Args:
        collective: Which collective the block runs, for the error: ``"the RMMC all-reduce"``.

    Raises:
        ReplicaLostError: In place of the backend's error, where that is about another rank.
    """
    try:
        yield
    except (ReplicaLostError, torch.AcceleratorError):
        # The second is about this rank's device: any earlier kernel's error comes up where the host next waits.
        raise
    except RuntimeError as error:
        reason = str(error).strip()
        rank = dist.get_rank() if dist.is_initialized() else 0
        if any(words in reason.lower() for words in _TIMEOUTS):
            raise ReplicaLostError(
                "Check whether another rank is stalled or its machine is gone; if it is only slow, raise the strategy's"
                f" `timeout`. On rank {rank} {collective} timed out: another rank did not arrive. ({reason})"
            ) from error
        if any(words in reason.lower() for words in _LOST_CONNECTIONS):
            raise ReplicaLostError(
                "Read the output of the other ranks: one of them has ended, and its last lines say why. Then restart"
                " from the newest checkpoint, as torchrun --max-restarts does."
                f" Rank {rank} lost the connection to another rank during {collective}. ({reason})"
            ) from error
        raise
