"""Reads a config as ``fit`` does, without starting a Trainer."""

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from logging import ERROR, getLogger
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from ..errors import PlanError
from ..main import CurvaDionCLI

# Learning-rate schedules may read the length of the run. Any number serves a plan.
_DEFAULT_MAX_STEPS = 1000


class ConfigCLI(CurvaDionCLI):
    """The command line of ``fit``: it builds model and data, and starts nothing.

    Args:
        args: As after ``fit``.

    Attributes:
        trainer_config: The config's arguments of the Trainer; none of them is instantiated.
    """

    def __init__(self, args: Sequence[str]) -> None:
        self.trainer_config: dict[str, Any] = {}
        super().__init__(args=["fit", *args])

    @override
    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        config = self.config["fit"]
        self.trainer_config = config.trainer.clone().as_dict()
        disabled = {"logger": False, "callbacks": None, "profiler": None, "plugins": None}
        for key, value in {**disabled, "strategy": "auto", "accelerator": "auto"}.items():
            config.trainer[key] = value

    @override
    def instantiate_trainer(self, **options: Any) -> pl.Trainer:
        steps = self.trainer_config.get("max_steps") or -1
        max_steps = steps if steps > 0 else _DEFAULT_MAX_STEPS
        return silent_trainer(accelerator="cpu", devices=1, max_epochs=-1, max_steps=max_steps)

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        pass


def silent_trainer(**options: Any) -> pl.Trainer:
    """A Trainer that writes no file and prints nothing.

    Example:
        >>> silent_trainer(accelerator="cpu", max_steps=3).loggers
        []
    """
    silent: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(**options, **silent, enable_model_summary=False)


@contextlib.contextmanager
def config_errors_as_plan_errors() -> Iterator[None]:
    """Turn errors of a command line or a Trainer into a :class:`PlanError`, and hide their other output.

    Example:
        >>> with config_errors_as_plan_errors():
        ...     ConfigCLI(["--trainer.max_stepz=3"])
        Traceback (most recent call last):
        lightning_curvadion.cli.errors.PlanError: ...
    """
    stderr = io.StringIO()
    loggers = {logger: logger.level for name in ("pytorch", "fabric") for logger in [getLogger(f"lightning.{name}")]}
    for logger in loggers:
        logger.setLevel(ERROR)
    try:
        with contextlib.redirect_stderr(stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except SystemExit as stopped:
        if stopped.code == 0:
            raise
        message = stderr.getvalue().strip()
        # What stands before it is how to call fit.
        raise PlanError(message.rpartition("\nerror: ")[2].removeprefix("error: ")) from stopped
    except MisconfigurationException as error:
        raise PlanError(one_line(error)) from error
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)


def one_line(error: Exception, max_length: int = 300) -> str:
    r"""The message of an error in one line.

    Example:
        >>> one_line(ValueError("two\n  lines"))
        'two lines'
    """
    return " ".join(str(error).split())[:max_length]
