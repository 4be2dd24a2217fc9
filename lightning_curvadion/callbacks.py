"""CommunicationMonitor: what a run saved, while it runs and at its end."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer
from typing_extensions import override

from .optimizer import CurvaDion


class CommunicationMonitor(Callback):
    """Counts sync steps and bytes; shows the sync rate in the progress bar and a table at the end of fit.

    Logs ``curvadion/rmmc``, ``curvadion/sync_rate`` and ``curvadion/bytes_sent`` at the Trainer's logging interval,
    if the Trainer has a logger. Under ``strategy="ddp"`` the same callback reports what DDP sends, so that two runs
    compare.

    Bytes are the payload of one replica's collectives (an all-reduce of n bytes counts n). What DDP would have sent
    is the size of all gradients times the number of optimizer steps.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.sync_steps = 0
        self.ddp_bytes = 0
        self._step_bytes = 0
        self._removers: list[Any] = []

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self.steps = self.sync_steps = self.ddp_bytes = self._step_bytes = 0
        self._removers = [optimizer.register_step_post_hook(self._count) for optimizer in trainer.optimizers]

    def _count(self, optimizer: Optimizer, *_: Any) -> None:
        self.steps += 1
        self.ddp_bytes += sum(p.nbytes for group in optimizer.param_groups for p in group["params"] if p.requires_grad)
        report = optimizer.last_step if isinstance(optimizer, CurvaDion) and optimizer.sync_hook is not None else None
        if report is not None:
            self.sync_steps += report.synced
            self._step_bytes += report.bytes_sent
        else:
            # No hook: the replicas communicate through DDP's reducer, at every step.
            self.sync_steps += 1
            self._step_bytes = self.ddp_bytes

    @property
    def sync_rate(self) -> float:
        """Share of the optimizer steps that synchronised."""
        return self.sync_steps / self.steps if self.steps else 0.0

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        pl_module.log("sync_rate", self.sync_rate, prog_bar=True, logger=False)
        values = {"sync_rate": self.sync_rate, "bytes_sent": float(self.bytes_sent(trainer))}
        reports = [optimizer.last_step for optimizer in trainer.optimizers if isinstance(optimizer, CurvaDion)]
        if reports and reports[0] is not None:
            values["rmmc"] = max(report.rmmc for report in reports if report is not None)
        pl_module.log_dict({f"curvadion/{name}": value for name, value in values.items()})

    def bytes_sent(self, trainer: "pl.Trainer") -> int:
        """Payload that this replica has sent for training so far, consensus outside of steps included."""
        hooks = {optimizer.sync_hook for optimizer in trainer.optimizers if isinstance(optimizer, CurvaDion)} - {None}
        return sum(hook.bytes_sent for hook in hooks if hook is not None) if hooks else self._step_bytes

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        for remover in self._removers:
            remover.remove()

    @override
    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if trainer.is_global_zero and self.steps:
            print(self.summary(trainer))

    def summary(self, trainer: "pl.Trainer") -> str:
        """The table that is printed at the end of fit."""
        sent = self.bytes_sent(trainer)
        rows = [(name, f"{value:.4f}") for name, value in trainer.callback_metrics.items() if name.startswith("val")]
        rows += [
            ("replicas", f"{trainer.world_size}"),
            ("optimizer steps", f"{self.steps}"),
            ("sync steps", f"{self.sync_steps} ({100 * self.sync_rate:.1f} %)"),
            ("sent per replica", f"{sent / 1e6:.2f} MB"),
            ("  of it in steps", f"{self._step_bytes / 1e6:.2f} MB"),
            ("DDP would have sent", f"{self.ddp_bytes / 1e6:.2f} MB"),
            ("ratio", f"{100 * sent / self.ddp_bytes:.2f} % of DDP" if self.ddp_bytes else "-"),
        ]
        width = max(len(name) for name, _ in rows)
        body = "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
        return f"\nCommunication of this run ({type(trainer.strategy).__name__})\n{body}"
