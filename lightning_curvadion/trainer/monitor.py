"""CommunicationMonitor: logs and sums up what a run communicates, and warns where its settings defeat the purpose."""

import re
import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from ..optim.curvadion import CurvaDion
from ..optim.step_signal import FIRST_MOMENTS
from ..sync.process_group_sync import ProcessGroupSync
from .advice import RunSoFar, advice_on_model, advice_on_run
from .lightning_internals import is_logging_step, optimizer_steps
from .metrics import RMMC, BytesSaved, BytesSent, Drift, StepsSinceSync, SyncRate


class CommunicationMonitor(Callback):
    """Logs what a run communicates, shows it in the progress bar, prints a table at the end, and warns of bad settings.

    Logged at the Trainer's ``log_every_n_steps``, through its loggers:

    - ``curvadion/rmmc``: of the last step, the largest of all momenta and replicas;
      ``curvadion/rmmc_group/...`` and ``curvadion/rmmc_layer/...``: of each parameter group and layer on this replica,
    - ``curvadion/sync_rate``: share of all steps so far that synchronised, ``curvadion/steps_since_sync``,
    - ``curvadion/bytes_sent``: payload of this replica so far, ``curvadion/bytes_saved``: DDP's payload less this one,
      both in bytes,
    - ``curvadion/seconds``: since training began.

    Logged once for every sync step since, under the step's own number: ``curvadion/drift``, the distance of this
    replica to the consensus relative to its norm, just before it took it over, and ``curvadion/local_steps``, the local
    steps before. A validation after a local step has a drift of its own.

    The progress bar shows the sync rate and the megabytes saved. Each warning comes once: where nearly every step
    synchronises, or none; where drift grows; where one embedding dominates what is sent; where validations and
    checkpoints send more than the steps. Under ``strategy="ddp"`` the same callback reports what DDP sends, so that two
    runs compare. The callback itself sends nothing.

    Bytes are the payload of one replica's collectives (an all-reduce of n bytes counts n). What DDP would send
    is the size of all gradients times the number of optimizer steps.

    Attributes:
        sync_rate, steps_since_sync, bytes_sent, bytes_saved, drift: The torchmetrics behind the values.

    Example:
        >>> monitor = CommunicationMonitor()
        >>> trainer = pl.Trainer(callbacks=[monitor], logger=False)
        >>> int(monitor.bytes_sent.sent)
        0
    """

    def __init__(self) -> None:
        # Without sync_on_compute: a metric must not start a collective here.
        self.sync_rate = SyncRate(sync_on_compute=False)
        self.steps_since_sync = StepsSinceSync(sync_on_compute=False)
        self.bytes_sent = BytesSent(sync_on_compute=False)
        self.bytes_saved = BytesSaved(sync_on_compute=False)
        self.drift = Drift(sync_on_compute=False)
        self._reset()

    def _reset(self) -> None:
        for metric in (self.sync_rate, self.steps_since_sync, self.bytes_sent, self.bytes_saved, self.drift):
            metric.reset()
        self._hook_handles: list[Any] = []
        self._hooks: list[ProcessGroupSync] = []
        self._step_bytes = 0
        self._sent_before_training = 0
        # (step of the Trainer, values) of sync steps that are not logged yet.
        self._unlogged_syncs: list[tuple[int, dict[str, float]]] = []
        self._drifts: list[float] = []
        self._synced_in_last_step = False
        self._warned: set[str] = set()
        self._start = time.perf_counter()

    # -- counting ----------------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._reset()
        attached = {optimizer.sync_hook for optimizer in trainer.optimizers if isinstance(optimizer, CurvaDion)}
        self._hooks = [hook for hook in attached if isinstance(hook, ProcessGroupSync)]
        for hook in self._hooks:
            hook.measure_drift()
        self._hook_handles = [
            optimizer.register_step_post_hook(lambda stepped, *_: self._count(trainer, stepped))
            for optimizer in trainer.optimizers
        ]
        self._count_between_steps()
        self._sent_before_training = int(self.bytes_sent.sent)
        if self._several_replicas(trainer):
            self._warn_once(dict(advice_on_model(pl_module)))

    def _count(self, trainer: "pl.Trainer", optimizer: Optimizer) -> None:
        ddp = sum(p.nbytes for group in optimizer.param_groups for p in group["params"] if p.requires_grad)
        hook = optimizer.sync_hook if isinstance(optimizer, CurvaDion) else None
        if isinstance(optimizer, CurvaDion) and isinstance(hook, ProcessGroupSync) and optimizer.last_step is not None:
            synced, sent = optimizer.last_step.synced, optimizer.last_step.bytes_sent
            self._synced_in_last_step = hook.drift is not None
            if synced:
                gap = float(self.steps_since_sync.steps)
                self._record_sync(optimizer_steps(trainer), hook.drift, local_steps=gap)
        else:
            # Without a hook the replicas communicate through DDP's reducer, at every step.
            synced, sent = True, ddp
        self._step_bytes += sent
        self.sync_rate.update(synced)
        self.steps_since_sync.update(synced)
        self.bytes_sent.update(sent)
        self.bytes_saved.update(sent, ddp)

    def _record_sync(self, step: int, drift: float | None, **more: float) -> None:
        self.drift.update(drift)
        if drift is not None:
            self._drifts.append(drift)
            more["drift"] = drift
        if more:
            self._unlogged_syncs.append((step, {f"curvadion/{name}": value for name, value in more.items()}))

    @override
    def on_validation_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        # After a sync step there was nothing left to average, and its drift is recorded.
        if not self._synced_in_last_step:
            for hook in self._hooks:
                self._record_sync(optimizer_steps(trainer), hook.drift)

    def _count_between_steps(self) -> None:
        """Count what was sent between steps, for validations and checkpoints."""
        between = sum(hook.bytes_sent for hook in self._hooks) - int(self.bytes_sent.sent) if self._hooks else 0
        self.bytes_sent.update(between)
        self.bytes_saved.update(between, ddp=0)

    # -- logging -----------------------------------------------------------------------------------------------------

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not int(self.sync_rate.steps):
            return
        self._count_between_steps()
        saved = {"sync_rate": self.sync_rate.compute(), "saved_MB": self.bytes_saved.saved / 1e6}
        pl_module.log_dict(saved, prog_bar=True, logger=False)
        if is_logging_step(trainer):
            pl_module.log_dict({f"curvadion/{name}": value for name, value in self._values(trainer).items()})
            self._log_syncs(trainer)
            self._advise(trainer)

    def _values(self, trainer: "pl.Trainer") -> dict[str, float]:
        values = {
            "sync_rate": float(self.sync_rate.compute()),
            "steps_since_sync": float(self.steps_since_sync.compute()),
            "bytes_sent": float(self.bytes_sent.compute()),
            "bytes_saved": float(self.bytes_saved.compute()),
            "seconds": time.perf_counter() - self._start,
        }
        stepped = [o for o in trainer.optimizers if isinstance(o, CurvaDion) and o.last_step is not None]
        if stepped:
            values["rmmc"] = max(optimizer.last_step.rmmc for optimizer in stepped if optimizer.last_step is not None)
        for optimizer in stepped:
            values.update(rmmc_by_group(optimizer))
        return values

    def _log_syncs(self, trainer: "pl.Trainer") -> None:
        unlogged, self._unlogged_syncs = self._unlogged_syncs, []
        for step, values in unlogged:
            for logger in trainer.loggers:
                logger.log_metrics(values, step=step)

    def _several_replicas(self, trainer: "pl.Trainer") -> bool:
        return bool(self._hooks) and trainer.world_size > 1

    def _advise(self, trainer: "pl.Trainer") -> None:
        if self._several_replicas(trainer):
            steps, sync_steps = int(self.sync_rate.steps), int(self.sync_rate.sync_steps)
            between = int(self.bytes_sent.sent) - self._step_bytes - self._sent_before_training
            self._warn_once(dict(advice_on_run(RunSoFar(steps, sync_steps, self._step_bytes, between, self._drifts))))

    def _warn_once(self, advice: Mapping[str, str]) -> None:
        for key, sentence in advice.items():
            if key not in self._warned:
                self._warned.add(key)
                rank_zero_warn(f"CommunicationMonitor: {sentence}")

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        for handle in self._hook_handles:
            handle.remove()
        self._log_syncs(trainer)
        self._advise(trainer)

    @override
    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._count_between_steps()
        if trainer.is_global_zero and int(self.sync_rate.steps):
            print(self.summary(trainer))

    def summary(self, trainer: "pl.Trainer") -> str:
        """The table that is printed at the end of fit."""
        steps, sync_steps = int(self.sync_rate.steps), int(self.sync_rate.sync_steps)
        sent = int(self.bytes_sent.sent)
        ddp = sent + int(self.bytes_saved.saved)
        rows = [(name, f"{value:.4f}") for name, value in trainer.callback_metrics.items() if name.startswith("val")]
        rows += [
            ("replicas", f"{trainer.world_size}"),
            ("optimizer steps", f"{steps}"),
            ("sync steps", f"{sync_steps} ({100 * sync_steps / steps:.1f} %)"),
            ("sent per replica", f"{sent / 1e6:.2f} MB"),
            ("  of it in steps", f"{self._step_bytes / 1e6:.2f} MB"),
            ("DDP would have sent", f"{ddp / 1e6:.2f} MB"),
            ("ratio", f"{100 * sent / ddp:.2f} % of DDP" if ddp else "-"),
        ]
        if self._drifts:
            drift = f"{100 * self.drift.compute().item():.2f} % of the parameters' norm, {100 * self._drifts[-1]:.2f} %"
            rows.append(("drift before syncs", f"{drift} at the last"))
        width = max(len(name) for name, _ in rows)
        body = "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
        return f"\nCommunication of this run ({type(trainer.strategy).__name__})\n{body}"


def rmmc_by_group(optimizer: CurvaDion) -> dict[str, float]:
    """RMMC of the last step by parameter group and by layer, on this replica.

    Args:
        optimizer: It has stepped.

    Returns:
        ``rmmc_group/<name>`` and ``rmmc_layer/<layer>``; a layer is a parameter's name up to its last number, such as
        ``gpt.blocks.3``, or the module that holds the parameter. AdamW and Lion groups are together one group and one
        layer, ``first moments``, since RMMC counts them as one.
    """
    changes = optimizer.rmmc_by_parameter()
    name_of = {parameter: name for name, parameter in optimizer.named_parameters()}
    members = {FIRST_MOMENTS: f"rmmc_group/{FIRST_MOMENTS}"}
    for number, group in enumerate(optimizer.param_groups):
        of_group = f"rmmc_group/{group.get('name', number)}"
        members.update({name_of[p]: of_group for p in group["params"] if name_of[p] in changes})
    groups = dict.fromkeys(members[name] for name in changes)
    metric = RMMC([*groups, *dict.fromkeys(map(_layer, changes))], sync_on_compute=False)
    for name, change in changes.items():
        metric.update(change, {members[name]: change, _layer(name): change})
    return {name: float(value) for name, value in metric.compute().items() if name != "max"}


def _layer(parameter_name: str) -> str:
    numbered = re.match(r"(.*\.\d+)\.", f"{parameter_name}.")
    return f"rmmc_layer/{numbered[1] if numbered else parameter_name.rpartition('.')[0] or parameter_name}"
