"""What a config would train, without training it: the model on the meta device, its optimizer, the sync settings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from ...optim.curvadion import CurvaDion
from ...optim.split_parameters import split_parameters
from ...sync.settings import SyncSettings
from ...trainer.lightning_internals import configured_optimizers, detach_trainer
from ...trainer.replica_processes import ReplicaSize, check_replica_size, processes_per_replica
from ...trainer.strategy import CurvaDionStrategy
from ..errors import PlanError
from .config_cli import ConfigCLI, config_errors_as_plan_errors, one_line
from .schedule import Schedule, read_schedule

_DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}


@dataclass(frozen=True)
class RunSetup:
    """What is planned.

    Attributes:
        model: On the meta device.
        optimizer: Of the model's parameters.
        settings: Of the sync hook.
        replicas: Their number in the config, ``None`` if the config leaves it to the machine.
        processes: Of each replica.
        backend: Of ``torch.distributed``.
        schedule: How often it steps, validates and saves.
        notes: A sentence for each choice made in place of the config.
    """

    model: nn.Module
    optimizer: CurvaDion
    settings: SyncSettings
    replicas: int | None
    processes: int
    backend: str
    schedule: Schedule
    notes: tuple[str, ...]


def read_run_setup(args: Sequence[str]) -> RunSetup:
    """Read a config as ``fit`` does and build its model on the meta device.

    Args:
        args: As after ``fit``: ``--config FILE`` and what overrides it.

    Raises:
        PlanError: The config cannot be read, or the model cannot be built without memory.

    Example:
        >>> args = ["--model=lightning.pytorch.demos.boring_classes.BoringModel", "--optimizer=CurvaDion"]
        >>> setup = read_run_setup(args)
        >>> setup.optimizer.param_groups[0]["name"], next(setup.model.parameters()).device.type, setup.replicas
        ('matrices', 'meta', None)
    """
    notes: list[str] = []
    with config_errors_as_plan_errors(), torch.device("meta"):
        try:
            command_line = ConfigCLI(args)
            model, trainer_config = command_line.model, command_line.trainer_config
            model.trainer = command_line.trainer
            if is_overridden("configure_model", model):
                model.configure_model()
        except (NotImplementedError, RuntimeError) as error:
            raise PlanError(
                f"the model cannot be built without memory, by torch.device('meta'): {one_line(error)};"
                " load weights and read their values in configure_optimizers or later, not in __init__"
            ) from error
        dtype = _DTYPES.get(str(trainer_config.get("precision")))
        if dtype is not None:
            model.to(dtype)
        optimizer = _configure_optimizer(model, notes)
        settings = _sync_settings(trainer_config, optimizer, notes)
    # The footprint is taken of a copy of the model, which must not copy the Trainer.
    detach_trainer(model)
    backend = _backend(trainer_config, notes)
    schedule = read_schedule(trainer_config)
    replicas, processes = _replicas(trainer_config)
    if processes > 1:
        notes.append(
            f"A replica has {processes} processes, which share its link and send what one would. So do DDP's here, as"
            " if they reduced inside of it first."
        )
    return RunSetup(model, optimizer, settings, replicas, processes, backend, schedule, tuple(notes))


def _configure_optimizer(model: pl.LightningModule, notes: list[str]) -> CurvaDion:
    optimizers = configured_optimizers(model)
    if len(optimizers) > 1:
        raise PlanError(f"a plan needs one optimizer; the model's configure_optimizers returned {len(optimizers)}")
    if isinstance(optimizers[0], CurvaDion):
        return optimizers[0]
    notes.append(
        f"The config's optimizer is {type(optimizers[0]).__name__}; this plans CurvaDion(split_parameters(model))."
    )
    return CurvaDion(split_parameters(model))


def _sync_settings(trainer_config: dict[str, Any], optimizer: CurvaDion, notes: list[str]) -> SyncSettings:
    strategy = trainer_config.get("strategy")
    name: Any = strategy
    options: dict[str, Any] = {}
    if isinstance(strategy, dict):
        name = strategy["class_path"].rpartition(".")[2]
        options = strategy.get("init_args") or {}
    if not str(name).lower().startswith("curvadion"):
        notes.append(f"The config's strategy is {name!r}; this plans CurvaDionStrategy with its defaults.")
        options = {}
    planned = CurvaDionStrategy(**{key: options[key] for key in SyncSettings.__dataclass_fields__ if key in options})
    settings = planned.make_sync_hook().settings_for(optimizer)
    try:
        settings.check_trigger(optimizer.trigger)
    except ValueError as error:
        raise PlanError(str(error)) from error
    return settings


def _backend(trainer_config: dict[str, Any], notes: list[str]) -> str:
    strategy, accelerator = trainer_config.get("strategy"), str(trainer_config.get("accelerator"))
    chosen = (strategy.get("init_args") or {}).get("process_group_backend") if isinstance(strategy, dict) else None
    if chosen:
        return str(chosen)
    if accelerator == "auto":
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        notes.append(
            f'The config\'s accelerator is "auto", which means {backend} on this machine; for another machine give'
            " --trainer.accelerator=gpu or cpu."
        )
        return backend
    return "gloo" if accelerator in ("cpu", "mps") else "nccl"


def _replicas(trainer_config: dict[str, Any]) -> tuple[int | None, int]:
    """Their number, if the config has it, and the processes of each."""
    devices, nodes = _num_devices(trainer_config), int(trainer_config.get("num_nodes") or 1)
    strategy = trainer_config.get("strategy")
    options = (strategy.get("init_args") or {}) if isinstance(strategy, dict) else {}
    replica_size: ReplicaSize = "node" if strategy == "curvadion_node" else options.get("replica_size", 1)
    if devices is None:
        if replica_size == "node":
            raise PlanError('replica_size="node" needs the number of devices of a node: set trainer.devices')
        return None, replica_size
    try:
        check_replica_size(replica_size)
        processes = processes_per_replica(replica_size, devices, devices * nodes)
    except MisconfigurationException as error:
        raise PlanError(str(error)) from error
    return devices * nodes // processes, processes


def _num_devices(trainer_config: dict[str, Any]) -> int | None:
    devices = trainer_config.get("devices")
    if isinstance(devices, str):
        devices = [part for part in devices.split(",") if part.strip()] if "," in devices else devices
        if isinstance(devices, str) and devices.isdigit():
            devices = int(devices)
    if isinstance(devices, list):
        devices = len(devices)
    return devices if isinstance(devices, int) and devices > 0 else None
