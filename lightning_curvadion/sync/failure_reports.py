"""Failure reports: what a failing rank leaves in the process group's store, so that the others can say which is gone.

Nothing is written before something fails. Under a Trainer the strategy reports; in a plain loop an exception that
nobody catches is reported where Python prints it.
"""

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
_KEY = "curvadion/failed/{rank}"
# A store whose host is gone may never answer.
_PATIENCE = 2.0
# How long the reports of ranks that fail for the same reason may take.
_WAIT = 1.0


@dataclass(frozen=True)
class OtherRanks:
    """What a failing rank knows of the others.

    Attributes:
        ended: Ranks that ended with an exception of their own, and which.
        silent: Ranks that left no report.
    """

    ended: dict[int, str]
    silent: list[int]


def report_failure(exception: BaseException | None = None) -> None:
    """Tell the other ranks that this one fails.

    Args:
        exception: Why; ``None`` if because of another rank.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        text = "" if exception is None else f"{type(exception).__name__}: {exception}"
        line = text.partition("\n")[0].strip(": ")[:300]
        _in_time(lambda: _store().set(_KEY.format(rank=dist.get_rank()), line))


class _UncaughtReporter:
    """An ``sys.excepthook`` that reports an exception once the hook before it has printed it.

    Args:
        printer: The hook before.
        other_than: Exceptions that are not reported: because of another rank.
    """

    def __init__(self, printer: Callable[..., Any], other_than: type[BaseException]) -> None:
        self._printer, self._other_than = printer, other_than

    def __call__(self, kind: type[BaseException], exception: BaseException, traceback: TracebackType | None) -> None:
        self._printer(kind, exception, traceback)
        if not isinstance(exception, self._other_than):
            report_failure(exception)


def report_uncaught_exceptions(other_than: type[BaseException]) -> None:
    """Let an exception that ends this process be reported, from now on.

    Args:
        other_than: Exceptions that are not reported: because of another rank.
    """
    if not isinstance(sys.excepthook, _UncaughtReporter):
        sys.excepthook = _UncaughtReporter(sys.excepthook, other_than)


def withdraw_report() -> None:
    """Remove this rank's report, as before training starts anew."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        _in_time(lambda: _store().delete_key(_KEY.format(rank=dist.get_rank())))


def read_reports() -> OtherRanks | None:
    """What the other ranks have reported; ``None`` if the store does not answer. Takes up to a second."""
    return _in_time(_read_reports)


def _read_reports() -> OtherRanks:
    others = [rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()]
    reports: dict[int, str] = {}
    deadline = time.monotonic() + _WAIT
    while True:
        for rank in others:
            key = _KEY.format(rank=rank)
            if rank not in reports and _store().check([key]):
                reports[rank] = _store().get(key).decode()
        # One is gone, or this one would not read.
        if len(reports) >= len(others) - 1 or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    ended = {rank: text for rank, text in reports.items() if text}
    return OtherRanks(ended, [rank for rank in others if rank not in reports])


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _in_time(call: Callable[[], T]) -> T | None:
    """The result of a call, or ``None`` where it fails or does not return in time."""
    results: list[T] = []

    def run() -> None:
        try:
            results.append(call())
        except (RuntimeError, ValueError):
            # The store went with its host.
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return results[0] if results else None
