"""The error of a collective that fails because another rank has ended or does not arrive."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist

from .failure_reports import OtherRanks, read_reports, report_failure

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


class LeftBehindError(RuntimeError):
    """The other replicas took this one for lost, and went on without it."""


class UnevenBatchesError(RuntimeError):
    """Some ranks have run out of batches while others train on; raised on all of them."""


@contextmanager
def explain_failure(collective: str, ranks: Sequence[int] = ()) -> Iterator[None]:
    """Turn the backend's error of a lost or stalled rank into one that says what to do.

    Args:
        collective: Which collective the block runs, for the error: ``"the RMMC all-reduce"``.
        ranks: Of its process group; none for all.

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
        late = any(words in reason.lower() for words in _TIMEOUTS)
        if not late and not any(words in reason.lower() for words in _LOST_CONNECTIONS):
            raise
        report_failure()
        rank = dist.get_rank() if dist.is_initialized() else 0
        others = read_reports() if dist.is_initialized() else None
        if others is not None and (missing := [silent for silent in others.silent if silent in ranks]):
            # Ranks outside of the group may go on, for a while.
            others = replace(others, silent=missing)
        explain = _explain_timeout if late else _explain_loss
        # Not as the cause: the reason is in the message, and gloo's holds more than that.
        raise ReplicaLostError(f"{explain(rank, collective, others)} ({_reason(reason)})") from None


def lost_replica(collective: str) -> ReplicaLostError:
    """The error of a process whose replica has lost another one, as another process of it has found out.

    Args:
        collective: Which collective failed there.
    """
    report_failure()
    return ReplicaLostError(_explain_loss(dist.get_rank(), collective, read_reports()))


def _explain_timeout(rank: int, collective: str, others: OtherRanks | None) -> str:
    if others is not None and others.ended:
        return f"{_ended(others.ended)} On rank {rank} {collective} timed out."
    which = _ranks(others.silent) if others is not None and others.silent else "another rank"
    return (
        f"Check whether {which} is stalled or its machine is gone; if it is only slow, raise the strategy's"
        f" `timeout`. On rank {rank} {collective} timed out: {which} did not arrive."
    )


def _explain_loss(rank: int, collective: str, others: OtherRanks | None) -> str:
    lost = f"Rank {rank} lost the connection to another rank during {collective}."
    restart = "restart from the newest checkpoint, as torchrun --max-restarts does."
    if others is None:
        return (
            f"Read what the other ranks printed, if they could, and {restart} {lost} The process group's store does not"
            " answer either: its host is gone, which is rank 0 where torchrun does not host it."
        )
    if others.ended:
        return f"{_ended(others.ended)} Then {restart} {lost}"
    if not others.silent:
        return f"Check the network between the ranks, and {restart} {lost} All ranks have reported as much."
    return (
        f"Read what {_ranks(others.silent)} printed, if it could, and {restart} {lost} No report came from"
        f" {_ranks(others.silent)}, as where a process is killed or its machine is gone."
    )


def _ended(ended: dict[int, str]) -> str:
    return " ".join(f"Mend what ended rank {rank}: {text}." for rank, text in ended.items())


def _ranks(ranks: Sequence[int]) -> str:
    """Ranks in words.

    Example:
        >>> _ranks([1]), _ranks([1, 2, 4])
        ('rank 1', 'one of the ranks 1, 2, 4')
    """
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"one of the ranks {', '.join(map(str, ranks))}"


def _reason(text: str) -> str:
    """A backend's message without the line of its source, and without gloo's advice.

    Example:
        >>> _reason("[/gloo/pair.cc:553] Connection closed by peer [10.0.0.2]:4311. This is typically caused by ...")
        'Connection closed by peer [10.0.0.2]:4311.'
    """
    return re.sub(r" This is typically caused by .*", "", re.sub(r"^\[\S+:\d+\] ", "", text), flags=re.DOTALL)
