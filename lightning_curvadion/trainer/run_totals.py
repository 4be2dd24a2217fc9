"""How long a run took, and what a run of several parts sent in all of them."""

import time
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from .formatting import format_bytes, format_duration, format_percent
from .run_metric import Event, Row, RunMetric, register_metric


@register_metric
class Seconds(RunMetric):
    """Seconds since training began.

    Example:
        >>> seconds = Seconds()
        >>> seconds.update()
        >>> 0 <= float(seconds.compute()) < 60
        True
    """

    name = "seconds"
    rows: ClassVar = {"seconds": Row("time of training", format_duration)}

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._start = self._now = time.perf_counter()

    def update(self) -> None:
        """Read the clock."""
        self._now = time.perf_counter()

    def compute(self) -> Tensor:
        """The seconds."""
        return torch.tensor(self._now - self._start)

    @override
    def values(self) -> dict[str, float]:
        self.update()
        return super().values()


@register_metric
class WholeRun(RunMetric):
    """Share of DDP's bytes that a run of several parts has sent, each resumed from a checkpoint of the one before.

    Its states are part of a checkpoint, unlike those of the others, which count this part.

    Example:
        >>> run = WholeRun()
        >>> run.update(sent=1_000, ddp=100_000, steps=1)
        >>> run.compute()
        tensor(0.0100)
    """

    name = "whole_run_share_of_ddp"
    rows: ClassVar = {
        "whole_run_steps": Row("whole run: optimizer steps", "{:.0f}".format),
        "whole_run_bytes_sent": Row("whole run: sent per replica", format_bytes),
        "whole_run_share_of_ddp": Row("whole run: share of DDP", format_percent),
    }
    sent: Tensor
    ddp: Tensor
    steps: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for state in ("sent", "ddp", "steps"):
            self.add_state(state, torch.tensor(0), dist_reduce_fx="sum", persistent=True)

    def update(self, sent: int, ddp: int, steps: int) -> None:
        """Add bytes, those of DDP, and steps."""
        self.sent = self.sent + sent
        self.ddp = self.ddp + ddp
        self.steps = self.steps + steps

    def compute(self) -> Tensor:
        """The share."""
        return self.sent / self.ddp.clamp_min(1)

    @override
    def observe(self, event: Event) -> None:
        self.update(event.sent, event.ddp, steps=int(event.synced is not None))

    @override
    def values(self) -> dict[str, float]:
        return {}

    @override
    def totals(self) -> dict[str, float]:
        # Of a run in one piece the other rows say all.
        if not self.resumed:
            return {}
        counts = {"whole_run_steps": float(self.steps), "whole_run_bytes_sent": float(self.sent)}
        return {**counts, self.name: float(self.compute())}
