"""CommunicationMonitor: logs and sums up what a run communicates, and says where its settings defeat the purpose."""

import os
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.optim import Optimizer
from typing_extensions import override

from ..optim.curvadion import CurvaDion
from ..sync.membership_changes import MembershipChange
from ..sync.process_group_sync import ProcessGroupSync

# These register themselves; their order is that of the rows in the closing table.
from . import metrics, rmmc_metric  # noqa: F401

# isort: split
from . import membership_metric, run_totals  # noqa: F401
from .advice import RunSoFar, advice_on_model, advice_on_run
from .lightning_internals import is_logging_step, optimizer_steps
from .membership_metric import Members
from .metrics import BytesSaved, BytesSent, Drift, StepsSinceSync, SyncRate
from .run_metric import METRICS, Cause, Event, RunMetric, loss_text, table_rows
from .run_settings import communication_settings

M = TypeVar("M", bound=RunMetric)


class CommunicationMonitor(Callback):
    """Logs what a run communicates, shows it in the progress bar, and prints a table and advice at the end.

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

    Where replicas come and go, under ``CurvaDionStrategy(elastic=True)``, also at the Trainer's interval, and once for
    every change, under the step at which this replica noticed it: ``curvadion/members``, their number,
    ``curvadion/replicas_lost`` and ``curvadion/replicas_joined`` so far, ``curvadion/samples_skipped``, which lost
    replicas had drawn and nobody trains on, and ``curvadion/membership_seconds``, how long this replica's training
    stood still for that. A replica counts from its own start.

    Logged once more when everything is sent, the last consensus and checkpoint too: every value of the table. Logged as
    hyperparameters: the settings of the sync hook and of the first optimizer's trigger. A run without CurvaDion's sync
    hook, as under ``strategy="ddp"``, logs what DDP sends, under ``ddp/``.

    The progress bar shows the sync rate and the megabytes saved. Advice comes once, above the progress bar, and again
    below the table where it holds for the whole run: where the sync rate is far above all that was measured, or 0;
    where drift grows; where one embedding dominates what is sent; where validations and checkpoints send more than the
    steps. The callback itself sends nothing.

    Bytes are the payload of one replica's collectives (an all-reduce of n bytes counts n), of all its processes
    together where it has several; what they send inside of it is left out. What DDP would send is the size of all
    gradients times the number of optimizer steps.

    Attributes:
        metrics: The metrics behind the values, by name; each is an attribute too. Yours are among them after
            :func:`~lightning_curvadion.trainer.run_metric.register_metric`.

    Example:
        >>> monitor = CommunicationMonitor()
        >>> trainer = pl.Trainer(callbacks=[monitor], logger=False)
        >>> int(monitor.bytes_sent.sent)
        0
    """

    def __init__(self) -> None:
        self._checkpointed: dict[str, Any] = {}
        self._reset()

    def _reset(self) -> None:
        # Without sync_on_compute: a metric must not start a collective here.
        self.metrics = {name: metric(sync_on_compute=False) for name, metric in METRICS.items()}
        self._hook_handles: list[Any] = []
        self._hooks: list[ProcessGroupSync] = []
        self._counted = 0
        # (step of the Trainer, values) of sync steps and of lost and joined replicas that are not logged yet.
        self._unlogged: list[tuple[int, dict[str, float]]] = []
        self._noted_changes = 0
        self._synced_in_last_step = False
        self._given: set[str] = set()
        self._advice_on_model: dict[str, str] = {}
        self._totals: dict[str, float] = {}
        self._resumed_at = 0

    def __getattr__(self, name: str) -> RunMetric:
        found: RunMetric | None = vars(self).get("metrics", {}).get(name)
        if found is None:
            raise AttributeError(f"{type(self).__name__} has no metric {name!r}")
        return found

    def _metric(self, kind: type[M]) -> M:
        return next(metric for metric in self.metrics.values() if isinstance(metric, kind))

    # -- counting ----------------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._reset()
        self._resumed_at = trainer.global_step
        for name, states in self._checkpointed.items():
            if name in self.metrics:
                self.metrics[name].load_state_dict(states)
                self.metrics[name].resumed = True
        self._checkpointed = {}
        attached = {optimizer.sync_hook for optimizer in trainer.optimizers if isinstance(optimizer, CurvaDion)}
        self._hooks = [hook for hook in attached if isinstance(hook, ProcessGroupSync)]
        for hook in self._hooks:
            hook.measure_drift()
        self._hook_handles = [
            optimizer.register_step_post_hook(lambda stepped, *_: self._count_step(trainer, stepped))
            for optimizer in trainer.optimizers
        ]
        # Checkpoints of weights only call no callback; all of them ask the module for its state.
        self._hook_handles.append(
            pl_module.register_state_dict_post_hook(lambda *_: self._count_between_steps("checkpoints"))
        )
        self._log_settings(trainer)
        self._note_changes(trainer, optimizer_steps(trainer))
        self._count_between_steps("ends")
        if self._several_replicas():
            self._advice_on_model = dict(advice_on_model(pl_module))
            self._give_advice(trainer, self._advice_on_model)

    def _observe(self, event: Event) -> None:
        for metric in self.metrics.values():
            metric.observe(event)

    def _newly_sent(self) -> int:
        sent = sum(hook.bytes_sent for hook in self._hooks)
        newly, self._counted = sent - self._counted, sent
        return newly

    def _count_step(self, trainer: "pl.Trainer", optimizer: Optimizer) -> None:
        ddp = sum(p.nbytes for group in optimizer.param_groups for p in group["params"] if p.requires_grad)
        hook = optimizer.sync_hook if isinstance(optimizer, CurvaDion) else None
        synced, sent, drift = True, ddp, None
        # Without a hook the replicas communicate through DDP's reducer, at every step.
        if isinstance(optimizer, CurvaDion) and isinstance(hook, ProcessGroupSync) and optimizer.last_step is not None:
            synced, sent = optimizer.last_step.synced, self._newly_sent()
            drift = hook.drift if synced else None
            self._synced_in_last_step = hook.drift is not None
            if synced:
                self._note_sync(trainer, drift, local_steps=float(self._metric(StepsSinceSync).steps))
        replicas = hook.world_size if isinstance(hook, ProcessGroupSync) else trainer.world_size
        self._observe(Event("steps", sent, ddp, optimizer, synced, drift, replicas))

    def _note_sync(self, trainer: "pl.Trainer", drift: float | None, **more: float) -> None:
        if drift is not None:
            more["drift"] = drift
        if more:
            self._unlogged.append((optimizer_steps(trainer), more))

    def _note_changes(self, trainer: "pl.Trainer", step: int) -> None:
        # Only a strategy whose replicas come and go has them.
        changes: list[MembershipChange] = getattr(trainer.strategy, "membership_changes", [])
        for change in changes[self._noted_changes :]:
            for metric in self.metrics.values():
                metric.observe_change(change)
            self._unlogged.append((step, self._metric(Members).values()))
        self._noted_changes = len(changes)

    def _count_between_steps(self, cause: Cause, drift: float | None = None) -> None:
        if self._hooks:
            sent = self._newly_sent()
            if sent or drift is not None:
                self._observe(Event(cause, sent, drift=drift))

    @override
    def on_validation_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        # After a sync step there was nothing left to average, and its drift is recorded.
        drifts = [] if self._synced_in_last_step else [hook.drift for hook in self._hooks]
        for drift in drifts:
            self._note_sync(trainer, drift)
        self._count_between_steps("validation", next(iter(drifts), None))

    @override
    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._count_between_steps("ends")

    @override
    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._count_between_steps("ends")

    # -- checkpoints -------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        states = {name: metric.state_dict() for name, metric in self.metrics.items()}
        return {name: dict(state) for name, state in states.items() if state}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._checkpointed = state_dict

    @override
    def on_save_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        self._count_between_steps("checkpoints")
        # The states so far were taken before the optimizers' were averaged.
        checkpoint.setdefault("callbacks", {})[self.state_key] = self.state_dict()

    # -- logging -----------------------------------------------------------------------------------------------------

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._note_changes(trainer, optimizer_steps(trainer))
        rate = self._metric(SyncRate)
        if not rate.update_called:
            return
        saved = {"sync_rate": rate.compute(), "saved_MB": self._metric(BytesSaved).compute() / 1e6}
        pl_module.log_dict(saved, prog_bar=True, logger=False)
        if is_logging_step(trainer):
            pl_module.log_dict(self._tagged(dict(self._values())))
            self._log_noted(trainer)
            if self._several_replicas():
                self._give_advice(trainer, self._advice_on_run())

    def _log_settings(self, trainer: "pl.Trainer") -> None:
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, CurvaDion) and isinstance(optimizer.sync_hook, ProcessGroupSync):
                hook = optimizer.sync_hook
                settings = communication_settings(hook.settings, optimizer, hook.world_size)
                for logger in trainer.loggers:
                    logger.log_hyperparams({"curvadion": settings})
                    if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                        # It writes its file once, and the Trainer had it written before there were optimizers.
                        save_hparams_to_yaml(os.path.join(logger.log_dir, logger.NAME_HPARAMS_FILE), logger.hparams)
                return

    def _tagged(self, values: Mapping[str, float]) -> dict[str, float]:
        prefix = "curvadion" if self._hooks else "ddp"
        return {f"{prefix}/{name}": value for name, value in values.items()}

    def _values(self) -> Iterator[tuple[str, float]]:
        for metric in self.metrics.values():
            yield from metric.values().items()

    def _log_noted(self, trainer: "pl.Trainer") -> None:
        unlogged, self._unlogged = self._unlogged, []
        for step, values in unlogged:
            for logger in trainer.loggers:
                logger.log_metrics(self._tagged(values), step=step)

    # -- advice ------------------------------------------------------------------------------------------------------

    def _several_replicas(self) -> bool:
        return any(hook.world_size > 1 for hook in self._hooks)

    def _advice_on_run(self) -> dict[str, str]:
        rate, sent, drifts = self._metric(SyncRate), self._metric(BytesSent).by_cause, self._metric(Drift).history
        between = sent.get("validation", 0) + sent.get("checkpoints", 0)
        run = RunSoFar(int(rate.steps), int(rate.sync_steps), sent.get("steps", 0), between, drifts)
        return dict(advice_on_run(run))

    @rank_zero_only
    def _give_advice(self, trainer: "pl.Trainer", advice: Mapping[str, str]) -> None:
        bar = trainer.progress_bar_callback
        # A bar that is shown writes in its own line; one of tqdm prints nothing before it is shown.
        shown = getattr(bar, "is_enabled", bar is not None) and trainer.global_step > self._resumed_at
        for key, sentence in advice.items():
            if key not in self._given:
                self._given.add(key)
                (bar.print if bar is not None and shown else print)(f"CommunicationMonitor: {sentence}")

    # -- the end -----------------------------------------------------------------------------------------------------

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._count_between_steps("ends")

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for handle in self._hook_handles:
            handle.remove()

    @override
    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._remove_hooks()
        if not self._metric(SyncRate).update_called:
            return
        last = max(0, optimizer_steps(trainer) - 1)
        self._note_changes(trainer, last)
        self._log_noted(trainer)
        totals = {}
        for metric in self.metrics.values():
            totals.update(metric.totals())
        self._totals = totals
        for logger in trainer.loggers:
            logger.log_metrics(self._tagged(totals), step=last)
        if trainer.is_global_zero:
            print(self.summary(trainer))

    def summary(self, trainer: "pl.Trainer") -> str:
        """The table that is printed at the end of fit, with advice below it."""
        rows = {
            name: loss_text(float(value))
            for name, value in sorted(trainer.callback_metrics.items())
            if name.startswith("val")
        }
        rows.update(table_rows(self._totals))
        width = max(map(len, rows), default=0)
        body = [f"  {name:<{width}}  {value}" for name, value in rows.items()]
        part = f"this part of the run, resumed after step {self._resumed_at}" if self._resumed_at else "this run"
        heading = f"\nCommunication of {part} ({type(trainer.strategy).__name__})"
        advice = {**self._advice_on_model, **(self._advice_on_run() if self._several_replicas() else {})}
        return "\n".join([heading, *body, *(f"\n{sentence}" for sentence in advice.values())])
