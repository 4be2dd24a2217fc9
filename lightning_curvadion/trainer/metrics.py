"""What a run communicates, as torchmetrics: for any loop that steps a :class:`~lightning_curvadion.CurvaDion`.

:class:`~lightning_curvadion.CommunicationMonitor` updates them for a Trainer. In a loop of your own::

    rate = SyncRate()
    ...
    optimizer.step()
    rate.update(optimizer.last_step.synced)

In a process group ``compute()`` of any torchmetric communicates; ``sync_on_compute=False`` computes on this replica,
where all but bytes, drift and the groups of RMMC are the same on every replica anyway.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from .formatting import format_bytes, format_percent
from .run_metric import Cause, Event, Row, RunMetric, register_metric


def _rate_text(rate: float) -> str:
    return f"{100 * rate:.1f} %"


@register_metric
class Replicas(RunMetric):
    """Number of replicas.

    Example:
        >>> replicas = Replicas()
        >>> replicas.update(2)
        >>> replicas.compute()
        tensor(2)
    """

    name = "replicas"
    rows: ClassVar = {"replicas": Row("replicas")}
    number: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("number", torch.tensor(1), dist_reduce_fx="max")

    def update(self, number: int) -> None:
        """Set the number."""
        self.number = torch.tensor(number)

    def compute(self) -> Tensor:
        """The number."""
        return self.number

    @override
    def observe(self, event: Event) -> None:
        if event.synced is not None:
            self.update(event.replicas)

    @override
    def values(self) -> dict[str, float]:
        return {}

    @override
    def totals(self) -> dict[str, float]:
        return super().values()


@register_metric
class SyncRate(RunMetric):
    """Share of the steps that synchronised, in [0, 1].

    Args:
        **options: Of ``torchmetrics.Metric``.

    Example:
        >>> rate = SyncRate()
        >>> for synced in (True, False, False, False):
        ...     rate.update(synced)
        >>> rate.compute()
        tensor(0.2500)
    """

    name = "sync_rate"
    rows: ClassVar = {
        "steps": Row("optimizer steps", "{:.0f}".format),
        "sync_steps": Row("sync steps", "{:.0f}".format),
        "sync_rate": Row("sync rate", _rate_text),
    }
    steps: Tensor
    sync_steps: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("steps", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("sync_steps", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, synced: bool) -> None:
        """Count a step.

        Args:
            synced: Whether it synchronised, ``optimizer.last_step.synced``.
        """
        self.steps += 1
        self.sync_steps += int(synced)

    def compute(self) -> Tensor:
        """The share so far; 0 before the first step."""
        return self.sync_steps / self.steps.clamp_min(1)

    @override
    def observe(self, event: Event) -> None:
        if event.synced is not None:
            self.update(event.synced)

    @override
    def totals(self) -> dict[str, float]:
        return {"steps": float(self.steps), "sync_steps": float(self.sync_steps), **self.values()}


@register_metric
class StepsSinceSync(RunMetric):
    """Length of the present run of local steps.

    Args:
        **options: Of ``torchmetrics.Metric``.

    Example:
        >>> since = StepsSinceSync()
        >>> for synced in (True, False, False):
        ...     since.update(synced)
        >>> since.compute()
        tensor(2)
    """

    name = "steps_since_sync"
    rows: ClassVar = {"steps_since_sync": None}
    steps: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("steps", torch.tensor(0), dist_reduce_fx="max")

    def update(self, synced: bool) -> None:
        """Count a step.

        Args:
            synced: Whether it synchronised, ``optimizer.last_step.synced``.
        """
        self.steps = torch.zeros_like(self.steps) if synced else self.steps + 1

    def compute(self) -> Tensor:
        """How many local steps have followed the last sync step."""
        return self.steps

    @override
    def observe(self, event: Event) -> None:
        if event.synced is not None:
            self.update(event.synced)


@register_metric
class BytesSent(RunMetric):
    """Payload of collectives in bytes; a mean of n bytes, coded or not, counts n.

    Reduced over processes it is the sum of all replicas.

    Args:
        **options: Of ``torchmetrics.Metric``.

    Example:
        >>> sent = BytesSent()
        >>> for size in (16, 16, 4_000_016):
        ...     sent.update(size)
        >>> sent.compute()
        tensor(4000048)
    """

    name = "bytes_sent"
    rows: ClassVar = {
        "bytes_sent": Row("sent per replica", format_bytes),
        "bytes_in_steps": Row("  in steps", format_bytes),
        "bytes_in_validation": Row("  in validation", format_bytes),
        "bytes_in_checkpoints": Row("  in checkpoints", format_bytes),
        "bytes_at_ends": Row("  at start and end", format_bytes),
    }
    sent: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("sent", torch.tensor(0), dist_reduce_fx="sum")
        self.by_cause: dict[Cause, int] = {}

    def update(self, sent: int) -> None:
        """Add a step.

        Args:
            sent: Bytes, such as ``optimizer.last_step.bytes_sent``.
        """
        # Not in place: compute returns the state itself.
        self.sent = self.sent + sent

    def compute(self) -> Tensor:
        """Bytes so far."""
        return self.sent

    @override
    def observe(self, event: Event) -> None:
        self.update(event.sent)
        self.by_cause[event.cause] = self.by_cause.get(event.cause, 0) + event.sent

    @override
    def totals(self) -> dict[str, float]:
        keys: dict[Cause, str] = {
            "steps": "bytes_in_steps",
            "validation": "bytes_in_validation",
            "checkpoints": "bytes_in_checkpoints",
            "ends": "bytes_at_ends",
        }
        return {**self.values(), **{keys[cause]: float(sent) for cause, sent in self.by_cause.items()}}


@register_metric
class BytesSaved(RunMetric):
    """Bytes that DistributedDataParallel would send, every gradient at every step, less the bytes that were sent.

    Args:
        **options: Of ``torchmetrics.Metric``.

    Example:
        >>> saved = BytesSaved()
        >>> saved.update(sent=16, ddp=4_000_000)
        >>> saved.update(sent=125_016, ddp=4_000_000)
        >>> saved.compute()
        tensor(7874968)
    """

    name = "bytes_saved"
    rows: ClassVar = {
        "bytes_saved": None,
        "bytes_of_ddp": Row("DDP would have sent", format_bytes),
        "share_of_ddp": Row("share of DDP", format_percent),
    }
    saved: Tensor
    ddp: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("saved", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("ddp", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, sent: int, ddp: int) -> None:
        """Add a step, or what was sent between steps.

        Args:
            sent: Bytes that were sent.
            ddp: Bytes of all gradients, 0 between steps.
        """
        self.saved = self.saved + ddp - sent
        self.ddp = self.ddp + ddp

    def compute(self) -> Tensor:
        """Bytes so far; negative where more was sent than saved."""
        return self.saved

    @override
    def observe(self, event: Event) -> None:
        self.update(event.sent, event.ddp)

    @override
    def totals(self) -> dict[str, float]:
        saved, ddp = float(self.saved), float(self.ddp)
        return {**self.values(), "bytes_of_ddp": ddp, **({"share_of_ddp": (ddp - saved) / ddp} if ddp else {})}


@register_metric
class Drift(RunMetric):
    r"""Mean distance of a replica to the consensus just before it took it over, relative to the consensus's norm.

    :math:`\|x_i - \bar x\| / \|\bar x\|` over all parameters. After :meth:`ProcessGroupSync.measure_drift
    <lightning_curvadion.ProcessGroupSync.measure_drift>` the hook's ``drift`` has it at every sync step.

    Args:
        **options: Of ``torchmetrics.Metric``.

    Example:
        >>> drift = Drift()
        >>> drift.update(0.01)
        >>> drift.update(None)  # a local step
        >>> drift.update(0.03)
        >>> drift.compute()
        tensor(0.0200)
    """

    name = "mean_drift"
    rows: ClassVar = {
        "drift": None,
        "local_steps": None,
        "mean_drift": Row("drift before syncs, mean", format_percent),
        "last_drift": Row("drift before syncs, last", format_percent),
    }
    total: Tensor
    syncs: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("syncs", torch.tensor(0), dist_reduce_fx="sum")
        self.history: list[float] = []

    def update(self, drift: float | None) -> None:
        """Add a sync.

        Args:
            drift: The relative distance; ``None`` where the replicas did not synchronise.
        """
        if drift is not None:
            self.total += drift
            self.syncs += 1
            self.history.append(drift)

    def compute(self) -> Tensor:
        """The mean; 0 before the first sync."""
        return self.total / self.syncs.clamp_min(1)

    @override
    def observe(self, event: Event) -> None:
        self.update(event.drift)

    @override
    def values(self) -> dict[str, float]:
        # The monitor logs the drift of every sync at its own step.
        return {}

    @override
    def totals(self) -> dict[str, float]:
        return {"mean_drift": float(self.compute()), "last_drift": self.history[-1]} if self.history else {}
