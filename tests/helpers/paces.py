"""Replicas that take different numbers of steps, whatever the clocks say."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from lightning_curvadion.sync.pending_numbers import PendingNumbers

HETEROGENEOUS = {"heterogeneous": True, "lag": 1, "momentum": "displacement"}


@contextmanager
def steps_per_agreement(arrivals: Iterator[bool]) -> Iterator[None]:
    """Let an agreement have arrived at a step where ``arrivals`` says so, on this replica."""
    with mock.patch.object(PendingNumbers, "has_arrived", side_effect=arrivals):
        yield


def every(n: int) -> Iterator[bool]:
    """An agreement at each n-th step."""
    return (turn % n == n - 1 for turn in itertools.count())
