"""What a config would train, without training it: the model without memory, its optimizer and the sync settings."""

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from logging import ERROR, getLogger
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from ...optim.curvadion import CurvaDion
from ...optim.split_parameters import split_parameters
from ...sync.settings import SyncSettings
from ...trainer.strategy import CurvaDionStrategy
from ..main import CurvaDionCLI

_DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
# Schedules want to know how long a run is; a config that says nothing plans as well with any number.
_STEPS = 1000


class PlanError(ValueError):
    """The user's input does not make a plan; the message is one line that says what to do."""


@dataclass(frozen=True)
class Blueprint:
    """What is planned.

    Attributes:
        model: On the meta device.
        optimizer: Of the model's parameters.
        settings: Of the sync hook.
        replicas: As the config says it, ``None`` where it leaves that to the machine.
        backend: Of ``torch.distributed``.
        notes: What was decided in place of the config, a sentence each.
    """

    model: nn.Module
    optimizer: CurvaDion
    settings: SyncSettings
    replicas: int | None
    backend: str
    notes: tuple[str, ...]


class PlanningCLI(CurvaDionCLI):
    """The command line of ``fit``, which builds model and data and starts nothing.

    Args:
        args: As after ``fit``.

    Attributes:
        wanted: The config's settings of the Trainer, none of which has been built.
    """

    def __init__(self, args: Sequence[str]) -> None:
        self.wanted: dict[str, Any] = {}
        super().__init__(args=["fit", *args])

    @override
    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        config = self.config["fit"]
        self.wanted = config.trainer.clone().as_dict()
        nothing = {"logger": False, "callbacks": None, "profiler": None, "plugins": None}
        for key, value in {**nothing, "strategy": "auto", "accelerator": "auto"}.items():
            config.trainer[key] = value

    @override
    def instantiate_trainer(self, **options: Any) -> pl.Trainer:
        steps = self.wanted.get("max_steps") or -1
        settings = {"accelerator": "cpu", "devices": 1, "max_epochs": -1, "max_steps": steps if steps > 0 else _STEPS}
        return quiet_trainer(**settings)

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        pass


def quiet_trainer(**settings: Any) -> pl.Trainer:
    """A Trainer that writes nothing and tells nothing.

    Example:
        >>> quiet_trainer(accelerator="cpu", max_steps=3).loggers
        []
    """
    silent: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(**settings, **silent, enable_model_summary=False)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a command line or a Trainer says about bad input into a :class:`PlanError`, and keep them quiet else.

    Example:
        >>> with one_line_errors():
        ...     PlanningCLI(["--trainer.max_stepz=3"])
        Traceback (most recent call last):
        lightning_curvadion.cli.plan.run_setup.PlanError: ...
    """
    told = io.StringIO()
    loggers = {logger: logger.level for name in ("pytorch", "fabric") for logger in [getLogger(f"lightning.{name}")]}
    for logger in loggers:
        logger.setLevel(ERROR)
    try:
        with contextlib.redirect_stderr(told), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except SystemExit as stopped:
        if stopped.code == 0:
            raise
        lines = [line.strip() for line in told.getvalue().splitlines() if line.strip()]
        raise PlanError(lines[-1].removeprefix("error: ") if lines else "the config cannot be read") from stopped
    except MisconfigurationException as error:
        raise PlanError(_one_line(error)) from error
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def blueprint(args: Sequence[str]) -> Blueprint:
    """Read a config as ``fit`` does and build its model on the meta device.

    Args:
        args: As after ``fit``: ``--config FILE`` and what overrides it.

    Raises:
        PlanError: The config cannot be read, or the model cannot be built without memory.

    Example:
        >>> drawn = blueprint(["--model=lightning.pytorch.demos.boring_classes.BoringModel", "--optimizer=CurvaDion"])
        >>> drawn.optimizer.param_groups[0]["name"], next(drawn.model.parameters()).device.type, drawn.replicas
        ('matrices', 'meta', None)
    """
    notes: list[str] = []
    with one_line_errors(), torch.device("meta"):
        try:
            command_line = PlanningCLI(args)
            model, wanted = command_line.model, command_line.wanted
            model.trainer = command_line.trainer
            if is_overridden("configure_model", model):
                model.configure_model()
        except (NotImplementedError, RuntimeError) as error:
            raise PlanError(
                f"the model cannot be built without memory, by torch.device('meta'): {_one_line(error)};"
                " load weights and look at numbers in configure_optimizers or later, not in __init__"
            ) from error
        dtype = _DTYPES.get(str(wanted.get("precision")))
        if dtype is not None:
            model.to(dtype)
        optimizer = _optimizer_of(model, notes)
        settings = _settings_of(wanted, optimizer, notes)
    # A copy of the model must not copy the Trainer.
    model._trainer = None
    backend = _backend_of(wanted, notes)
    return Blueprint(model, optimizer, settings, _replicas_of(wanted), backend, tuple(notes))


def _optimizer_of(model: pl.LightningModule, notes: list[str]) -> CurvaDion:
    optimizers: list[Optimizer] = _init_optimizers_and_lr_schedulers(model)[0]
    if len(optimizers) > 1:
        raise PlanError(f"a plan has one optimizer; the model's configure_optimizers returned {len(optimizers)}")
    if isinstance(optimizers[0], CurvaDion):
        return optimizers[0]
    notes.append(
        f"The config's optimizer is {type(optimizers[0]).__name__}; this plans CurvaDion(split_parameters(model))."
    )
    return CurvaDion(split_parameters(model))


def _settings_of(wanted: dict[str, Any], optimizer: CurvaDion, notes: list[str]) -> SyncSettings:
    strategy = wanted.get("strategy")
    name: Any = strategy
    options: dict[str, Any] = {}
    if isinstance(strategy, dict):
        name = strategy["class_path"].rpartition(".")[2]
        options = strategy.get("init_args") or {}
    if not str(name).lower().startswith("curvadion"):
        notes.append(f"The config's strategy is {name!r}; this plans CurvaDionStrategy with its defaults.")
        options = {}
    planned = CurvaDionStrategy(**{key: options[key] for key in SyncSettings.__dataclass_fields__ if key in options})
    codable = all(parameter.dtype != torch.float64 for _, parameter in optimizer.named_parameters())
    return planned._new_sync(codable).settings


def _backend_of(wanted: dict[str, Any], notes: list[str]) -> str:
    strategy, accelerator = wanted.get("strategy"), str(wanted.get("accelerator"))
    named = (strategy.get("init_args") or {}).get("process_group_backend") if isinstance(strategy, dict) else None
    if named:
        return str(named)
    if accelerator == "auto":
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        notes.append(
            f'The config\'s accelerator is "auto", which is {backend} on this machine; for another one say'
            " --trainer.accelerator=gpu or cpu."
        )
        return backend
    return "gloo" if accelerator in ("cpu", "mps") else "nccl"


def _replicas_of(wanted: dict[str, Any]) -> int | None:
    devices, nodes = wanted.get("devices"), int(wanted.get("num_nodes") or 1)
    if isinstance(devices, str):
        devices = [part for part in devices.split(",") if part.strip()] if "," in devices else devices
        if isinstance(devices, str) and devices.isdigit():
            devices = int(devices)
    if isinstance(devices, list):
        devices = len(devices)
    return devices * nodes if isinstance(devices, int) and devices > 0 else None
