"""Private names of Lightning. Every use of one is in this file.

Each docstring says what is touched and with which versions of Lightning it was tried: 2.5.0, the oldest that the
package allows, and 2.6.6. ``tests/trainer/test_lightning_internals.py`` fails where a name has moved.
"""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.strategies.registry import _StrategyRegistry as StrategyRegistryType
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.fabric.utilities.init import _materialize_distributed_module
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO as WrappingCheckpointIO
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.data_connector import _parse_num_batches
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.data import _update_dataloader
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Sampler

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "IndependentProcessesLauncher",
    "SignalHandler",
    "StrategyRegistryType",
    "WrappingCheckpointIO",
    "averaged_model",
    "batches_begun",
    "configured_optimizers",
    "detach_trainer",
    "disable_sigterm_broadcast",
    "end_epoch_after_batch",
    "give_device_mesh",
    "is_logging_step",
    "leave_epoch_open",
    "load_loop_progress",
    "log_beside",
    "loop_progress",
    "materialize_shards",
    "optimizer_steps",
    "replace_signal_handlers",
    "requeue_job",
    "restart_data",
    "saves_within_epochs",
    "stop_after_batch",
    "train_dataloaders",
    "trainer_of",
    "update_epoch_length",
    "with_sampler",
]

SignalHandler = Callable[[int, FrameType | None], None]


def replace_signal_handlers(trainer: "pl.Trainer", on_sigterm: SignalHandler, on_requeue: SignalHandler) -> bool:
    """Replace Lightning's handlers of SIGTERM and of SLURM's requeue signal, and no other handler of these signals.

    ``Trainer._signal_connector``, its ``_sigterm_notifier_fn`` and ``_slurm_sigusr_handler_fn``: 2.5.0, 2.6.6.

    Returns:
        Whether SIGTERM was handled by Lightning. It is not in a thread that receives no signals.
    """
    connector = trainer._signal_connector
    replacements = {"_sigterm_notifier_fn": on_sigterm, "_slurm_sigusr_handler_fn": on_requeue}
    replaced = set()
    for signum in signal.valid_signals():
        handlers = getattr(signal.getsignal(signum), "signal_handlers", [])
        for name, replacement in replacements.items():
            if (original := getattr(connector, name, None)) in handlers:
                handlers[handlers.index(original)] = replacement
                replaced.add(name)
    return "_sigterm_notifier_fn" in replaced


def disable_sigterm_broadcast(trainer: "pl.Trainer") -> None:
    """Drop the broadcast of a SIGTERM flag before every batch.

    ``_TrainingEpochLoop._broadcast_sigterm_tensor``: 2.6.6; 2.5.0 has no such broadcast.
    """
    loop = trainer.fit_loop.epoch_loop
    if hasattr(loop, "_broadcast_sigterm_tensor"):
        loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def requeue_job(trainer: "pl.Trainer", signum: int) -> None:
    """Save a checkpoint and requeue the SLURM job, as Lightning's handler of the requeue signal does.

    ``Trainer._signal_connector._slurm_sigusr_handler_fn``: 2.5.0, 2.6.6.
    """
    trainer._signal_connector._slurm_sigusr_handler_fn(signum, None)  # type: ignore[arg-type]


def stop_after_batch(trainer: "pl.Trainer") -> None:
    """Let the training loop end after this batch, as it does after SIGTERM.

    ``Trainer._signal_connector.received_sigterm``: 2.5.0, 2.6.6.
    """
    trainer._signal_connector.received_sigterm = True


def averaged_model(callback: Callback) -> nn.Module | None:
    """The moving average of the weights that a callback keeps, if it keeps one.

    ``_average_model`` of ``StochasticWeightAveraging``: 2.5.0, 2.6.6; of ``WeightAveraging``: 2.6.6.
    """
    model = getattr(callback, "_average_model", None)
    return model if isinstance(model, nn.Module) else None


def trainer_of(module: "pl.LightningModule | None") -> "pl.Trainer | None":
    """The Trainer of a module, without the error that ``module.trainer`` raises where there is none.

    ``LightningModule._trainer``: 2.5.0, 2.6.6.
    """
    return module._trainer if module is not None else None


def detach_trainer(module: "pl.LightningModule") -> None:
    """Forget the Trainer of a module, so that a copy of the module does not copy it.

    ``LightningModule._trainer``: 2.5.0, 2.6.6.
    """
    module._trainer = None


def give_device_mesh(module: "pl.LightningModule", mesh: "DeviceMesh") -> None:
    """Let ``LightningModule.device_mesh`` be a mesh, as under ``ModelParallelStrategy``.

    ``LightningModule._device_mesh``: 2.5.0, 2.6.6.
    """
    module._device_mesh = mesh


def materialize_shards(module: nn.Module, device: torch.device) -> None:
    """Give the parameters of a module memory where they are on the meta device, and let its parts initialise them.

    ``lightning.fabric.utilities.init._materialize_distributed_module``: 2.5.0, 2.6.6.
    """
    _materialize_distributed_module(module, device)


def optimizer_steps(trainer: "pl.Trainer") -> int:
    """The step under which Lightning logs: batches after which an optimizer has stepped.

    ``_TrainingEpochLoop._batches_that_stepped``: 2.5.0, 2.6.6.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def is_logging_step(trainer: "pl.Trainer") -> bool:
    """Whether ``log_every_n_steps`` falls on this batch.

    ``Trainer._logger_connector.should_update_logs``: 2.5.0, 2.6.6.
    """
    return trainer._logger_connector.should_update_logs


def configured_optimizers(module: "pl.LightningModule") -> list[Optimizer]:
    """The optimizers that ``configure_optimizers`` returns, in any of the forms that Lightning accepts.

    ``lightning.pytorch.core.optimizer._init_optimizers_and_lr_schedulers``: 2.5.0, 2.6.6.
    """
    return _init_optimizers_and_lr_schedulers(module)[0]


class IndependentProcessesLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher of processes on a machine, none of which ends because another one does.

    ``_SubprocessScriptLauncher`` and its ``_call_children_scripts``, ``_set_num_threads_if_needed``: 2.5.0, 2.6.6.
    """

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **options: Any) -> Any:
        """As Lightning's, without the thread that watches over the processes."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **options)


def with_sampler(dataloader: DataLoader[Any], sampler: Sampler[int]) -> DataLoader[Any]:
    """The same dataloader with another sampler.

    ``lightning.pytorch.utilities.data._update_dataloader``: 2.5.0, 2.6.6.
    """
    return _update_dataloader(dataloader, sampler)


def train_dataloaders(trainer: "pl.Trainer") -> list[Any]:
    """Those that are trained with now.

    ``FitLoop._combined_loader``: 2.5.0, 2.6.6.
    """
    loader = trainer.fit_loop._combined_loader
    return loader.flattened if loader is not None else []


def update_epoch_length(trainer: "pl.Trainer", begins: bool = False) -> None:
    """Let the training epoch be as long as its dataloaders say now.

    Args:
        trainer: Of the loop.
        begins: Whether the epoch is about to begin. In its middle a replica may have validated already where a part of
            the former length is over, so that this part stays.

    ``FitLoop._combined_loader`` with ``CombinedLoader._limits``, ``FitLoop._data_fetcher``, ``_parse_num_batches`` and
    ``sized_len``: 2.5.0, 2.6.6.
    """
    loop = trainer.fit_loop
    loader = cast(CombinedLoader, loop._combined_loader)
    limits = [
        _parse_num_batches(RunningStage.TRAINING, length, trainer.limit_train_batches)
        for length in map(sized_len, loader.flattened)
        if length is not None
    ]
    if loop._data_fetcher is None or loader._limits is None or len(limits) < len(loader.flattened):
        return
    # In place, for the iterator that holds them too.
    loader._limits[:] = limits
    loop._data_fetcher.length = length = sized_len(loader)
    assert length is not None
    loop.max_batches = length
    part = trainer.val_check_interval
    if isinstance(part, float) and trainer.val_check_batch is not None and (begins or part == 1.0):
        trainer.val_check_batch = max(1, int(length * part))


def batches_begun(trainer: "pl.Trainer") -> int:
    """Batches of this epoch that were trained on, or are now.

    ``_TrainingEpochLoop.batch_progress``: 2.5.0, 2.6.6.
    """
    return cast(Any, trainer.fit_loop.epoch_loop.batch_progress.current).started  # type: ignore[no-any-return]


def loop_progress(trainer: "pl.Trainer") -> dict[str, Any]:
    """Where the training loop is before a batch, plain numbers.

    ``_Loop.state_dict``: 2.5.0, 2.6.6.
    """
    return trainer.fit_loop.state_dict()


def load_loop_progress(trainer: "pl.Trainer", progress: dict[str, Any]) -> None:
    """Put the training loop where another replica's is: called where an epoch begins, before its first batch.

    The loop goes on as where it is resumed in the middle of an epoch. ``_Loop.load_state_dict``, ``restarting`` and the
    progress of each loop: 2.5.0, 2.6.6.
    """
    loop = trainer.fit_loop
    loop.load_state_dict(progress)
    loop.on_iteration_done()
    epochs, batches = loop.epoch_progress, cast(Any, loop.epoch_loop.batch_progress)
    for count in (cast(Any, epochs.total), cast(Any, epochs.current)):
        # Counted after the callbacks.
        count.started -= 1
    for count in (batches.total, batches.current):
        # The other replica has fetched its batch.
        count.ready = count.started
    batches.is_last_batch = False
    loop.epoch_loop.restarting = True
    if not loop.epoch_loop._should_accumulate():
        # A checkpoint is saved before it is counted, and a restart counts it.
        loop.epoch_loop._batches_that_stepped -= 1


def restart_data(trainer: "pl.Trainer") -> None:
    """Let the dataloaders of an epoch that is about to begin ask their samplers again.

    ``FitLoop._data_fetcher``: 2.5.0, 2.6.6.
    """
    assert trainer.fit_loop._data_fetcher is not None
    iter(trainer.fit_loop._data_fetcher)


def log_beside(logger: Logger) -> None:
    """Let a logger that has written nothing so far leave the file of the process that wrote before it as it is.

    ``CSVLogger`` would delete it. ``CSVLogger._experiment``, ``_version`` and ``_get_next_version``: 2.5.0, 2.6.6.
    """
    if not isinstance(logger, CSVLogger) or logger._experiment is not None:
        return
    if os.path.exists(os.path.join(logger.log_dir, "metrics.csv")):
        named = isinstance(logger.version, str)
        logger._version = f"{logger.version}-{os.getpid()}" if named else logger._get_next_version()


def saves_within_epochs(callback: ModelCheckpoint) -> bool:
    """Whether a callback saves after so many steps, or so much time.

    ``ModelCheckpoint._every_n_train_steps`` and ``_train_time_interval``: 2.5.0, 2.6.6.
    """
    return bool(callback._every_n_train_steps) or callback._train_time_interval is not None


def leave_epoch_open(trainer: "pl.Trainer") -> None:
    """Let an epoch go on until :func:`end_epoch_after_batch`, whatever its dataloaders say.

    ``FitLoop._combined_loader`` with ``CombinedLoader._limits``, ``FitLoop._data_fetcher``: 2.5.0, 2.6.6.
    """
    loop = trainer.fit_loop
    loader, fetcher = cast(CombinedLoader, loop._combined_loader), cast(Any, loop._data_fetcher)
    if loader._limits is not None:
        loader._limits[:] = [float("inf")] * len(loader._limits)
    loop.max_batches = float("inf")
    # An infinite one would let an integer limit_train_batches decide.
    trainer.val_check_batch = sys.maxsize
    fetcher.length, fetcher.done = None, False


def end_epoch_after_batch(trainer: "pl.Trainer") -> None:
    """Let this batch be the last one of its epoch, after which a validation is due; called when it has been trained on.

    ``_TrainingEpochLoop.batch_progress`` and ``update_lr_schedulers``: 2.5.0, 2.6.6.
    """
    loop = trainer.fit_loop.epoch_loop
    trainer.fit_loop.max_batches = trainer.val_check_batch = cast(Any, loop.batch_progress.current).ready
    # As the loop does before its callbacks, where it knows that this is the last batch.
    loop.update_lr_schedulers("epoch", update_plateau_schedulers=False)
