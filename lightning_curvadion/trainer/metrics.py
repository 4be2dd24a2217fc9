"""What a run communicates, as torchmetrics: for any loop that steps a :class:`~lightning_curvadion.CurvaDion`.

:class:`~lightning_curvadion.CommunicationMonitor` updates them for a Trainer. In a loop of your own::

    rate = SyncRate()
    ...
    optimizer.step()
    rate.update(optimizer.last_step.synced)

In a process group ``compute()`` of any torchmetric communicates; ``sync_on_compute=False`` computes on this replica,
where all but bytes, drift and the groups of RMMC are the same on every replica anyway.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class SyncRate(Metric):
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

    full_state_update = False
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


class StepsSinceSync(Metric):
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

    full_state_update = False
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


class BytesSent(Metric):
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

    full_state_update = False
    sent: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("sent", torch.tensor(0), dist_reduce_fx="sum")

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


class BytesSaved(Metric):
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

    full_state_update = False
    saved: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("saved", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, sent: int, ddp: int) -> None:
        """Add a step, or what was sent between steps.

        Args:
            sent: Bytes that were sent.
            ddp: Bytes of all gradients, 0 between steps.
        """
        self.saved = self.saved + ddp - sent

    def compute(self) -> Tensor:
        """Bytes so far; negative where more was sent than saved."""
        return self.saved


class Drift(Metric):
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

    full_state_update = False
    total: Tensor
    syncs: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("syncs", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, drift: float | None) -> None:
        """Add a sync.

        Args:
            drift: The relative distance; ``None`` where the replicas did not synchronise.
        """
        if drift is not None:
            self.total += drift
            self.syncs += 1

    def compute(self) -> Tensor:
        """The mean; 0 before the first sync."""
        return self.total / self.syncs.clamp_min(1)


class RMMC(Metric):
    """The largest Relative Maximum Momentum Change since the last reset, of all momenta and of each group.

    First steps, whose change counts as infinite, are left out.

    Args:
        groups: Names of the groups, such as parameter groups or layers.
        **options: Of ``torchmetrics.Metric``.

    Example:
        >>> rmmc = RMMC(groups=["attention", "mlp"])
        >>> rmmc.update(0.30, {"attention": 0.10, "mlp": 0.30})
        >>> rmmc.update(0.20, {"attention": 0.20, "mlp": 0.05})
        >>> {name: round(value.item(), 2) for name, value in rmmc.compute().items()}
        {'max': 0.3, 'attention': 0.2, 'mlp': 0.3}
    """

    full_state_update = False
    largest: Tensor

    def __init__(self, groups: Sequence[str] = (), **options: Any) -> None:
        super().__init__(**options)
        self.groups = tuple(groups)
        self.add_state("largest", torch.zeros(1 + len(self.groups)), dist_reduce_fx="max")

    def update(self, rmmc: float, by_group: Mapping[str, float] | None = None) -> None:
        """Add a step.

        Args:
            rmmc: Of all momenta, ``optimizer.last_step.rmmc``.
            by_group: Of each group; a missing one had nothing to train.
        """
        by_group = by_group or {}
        values = [rmmc, *(by_group.get(name, 0.0) for name in self.groups)]
        finite = torch.tensor([value if math.isfinite(value) else 0.0 for value in values])
        self.largest = torch.maximum(self.largest, finite.to(self.largest))

    def compute(self) -> dict[str, Tensor]:
        """The largest of all under ``"max"``, and that of each group under its name."""
        return dict(zip(("max", *self.groups), self.largest.unbind(), strict=True))
