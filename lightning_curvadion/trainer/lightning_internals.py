"""Private names of Lightning. Every use of one is in this file.

Each docstring says what is touched and with which versions of Lightning it was tried: 2.5.0, the oldest that the
package allows, and 2.6.6. ``tests/trainer/test_lightning_internals.py`` fails where a name has moved.
"""

import signal
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from lightning.fabric.strategies.registry import _StrategyRegistry as StrategyRegistryType
from lightning.fabric.utilities.init import _materialize_distributed_module
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO as WrappingCheckpointIO
from torch import nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "SignalHandler",
    "StrategyRegistryType",
    "WrappingCheckpointIO",
    "averaged_model",
    "configured_optimizers",
    "detach_trainer",
    "disable_sigterm_broadcast",
    "give_device_mesh",
    "is_logging_step",
    "materialize_shards",
    "optimizer_steps",
    "replace_signal_handlers",
    "requeue_job",
    "stop_after_batch",
    "trainer_of",
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
