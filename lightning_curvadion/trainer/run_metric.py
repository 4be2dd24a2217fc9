"""RunMetric: what a run is measured by, with its log keys and its rows of the closing table in one class.

:class:`~lightning_curvadion.CommunicationMonitor` logs every registered class and has its rows in the closing table;
``python -m lightning_curvadion report`` takes the same rows from the logs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch.optim import Optimizer
from torchmetrics import Metric

from ..sync.membership_changes import MembershipChange
from .formatting import format_number

# Why something was sent. "ends" are the start and the end of fit and of epochs.
Cause = Literal["steps", "validation", "checkpoints", "ends"]


@dataclass(frozen=True)
class Event:
    """An optimizer step, or what was sent between steps.

    Attributes:
        cause: Why it was sent.
        sent: Payload of this replica in bytes.
        ddp: What DDP would have sent in the step; 0 between steps.
        optimizer: The one that has stepped; ``None`` between steps.
        synced: Whether the step synchronised; ``None`` between steps.
        drift: Distance to a consensus that was reached; ``None`` where none was, or nobody measured it.
        replicas: Their number.
    """

    cause: Cause
    sent: int
    ddp: int = 0
    optimizer: Optimizer | None = None
    synced: bool | None = None
    drift: float | None = None
    replicas: int = 1


class Row(NamedTuple):
    """A row of the closing table and of the report: its label, and how its value reads."""

    label: str
    text: Callable[[float], str] = format_number


class RunMetric(Metric):
    """A torchmetric that the monitor can log, and its rows.

    A subclass has ``update`` and ``compute`` as every torchmetric, takes from an :class:`Event` what it counts, and
    registers itself with :func:`register_metric`. It must start no collective: it computes on this replica.

    Attributes:
        name: The key of what ``compute`` gives.
        rows: The row of each key of ``totals``; ``None`` for one that says nothing at the end. A key that is not here
            gets a row with its own name.

    Args:
        sync_on_compute: ``True`` in a loop of your own, to reduce over the process group.
    """

    name: ClassVar[str]
    rows: ClassVar[Mapping[str, Row | None]] = {}
    full_state_update = False
    # Whether the states are those of a checkpoint.
    resumed = False

    def __init__(self, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)

    def observe(self, event: Event) -> None:
        """Update from a step, or from what was sent between steps."""

    def observe_change(self, change: MembershipChange) -> None:
        """Update from replicas that were lost or joined; the first change of an elastic run is its start."""

    def values(self) -> dict[str, float]:
        """What is logged now, by key below ``curvadion/``."""
        return {self.name: float(self.compute())} if self.update_called else {}

    def totals(self) -> dict[str, float]:
        """What is logged at the end of fit, when everything is sent: the values of the rows are among it."""
        return self.values()


METRICS: dict[str, type[RunMetric]] = {}
MetricClass = TypeVar("MetricClass", bound=type[RunMetric])


def register_metric(metric: MetricClass) -> MetricClass:
    """Let every :class:`~lightning_curvadion.CommunicationMonitor` log a metric; a class decorator."""
    METRICS[metric.name] = metric
    return metric


def table_rows(totals: Mapping[str, float]) -> dict[str, str]:
    """Labels and texts of the closing table, which is also the report's.

    Args:
        totals: Values by key. Keys without a row of a registered metric come last, as they are.
    """
    known = {key: row for metric in METRICS.values() for key, row in metric.rows.items()}
    others = {key: Row(key.replace("_", " ")) for key in totals if key not in known}
    return {
        row.label: row.text(_as_float32(totals[key]))
        for key, row in {**known, **others}.items()
        if row is not None and key in totals
    }


def loss_text(value: float) -> str:
    """A loss, or another value of a validation, as the closing table and the report show it."""
    return f"{_as_float32(value):.4f}"


def _as_float32(value: float) -> float:
    """A value as TensorBoard stores it, so that it reads the same from every logger."""
    return torch.tensor(value, dtype=torch.float32).item()
