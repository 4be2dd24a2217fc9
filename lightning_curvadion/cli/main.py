"""The command line: ``python -m lightning_curvadion {fit,validate,test,predict} --config FILE``.

And two commands of its own: ``report`` draws what a run has logged, ``plan`` says what a run would cost.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from types import MethodType
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, LRSchedulerCallable
from lightning.pytorch.strategies import StrategyRegistry
from torch.optim import Optimizer
from typing_extensions import override

from ..optim.curvadion import CurvaDion
from ..optim.split_parameters import split_parameters
from .suggestions import SuggestingParser, did_you_mean

OptimizerCallable = Callable[[Iterable[Any]], Optimizer]
# Names that the Trainer takes beside those of the registry.
_OTHER_STRATEGIES = ("auto", "hpu_parallel", "hpu_single")
_OWN_COMMANDS = {"report": ".report.report", "plan": ".plan.plan"}


class CurvaDionCLI(LightningCLI):
    """LightningCLI for models that train with CurvaDion: an optimizer and its parameter groups without code.

    Every setting comes from the command line, from ``--config`` files, of which later ones win, or from environment
    variables such as ``PL_FIT__TRAINER__MAX_STEPS``. Beside LightningCLI's keys there are

    - ``optimizer``: any optimizer; :class:`~lightning_curvadion.CurvaDion` gets the groups of
      :func:`~lightning_curvadion.split_parameters`, so that the module needs no ``configure_optimizers``,
    - ``groups``: the arguments of ``split_parameters``; given, they also serve other optimizers,
    - ``lr_scheduler`` and ``lr_interval``, whether it moves after every step or every epoch,
    - ``links``: values that are the same by nature, such as ``{model.context: data.context}``.

    Args:
        model_class: The module; by default any, which ``model.class_path`` then names.
        datamodule_class: The data, likewise.
        **options: Further arguments of ``LightningCLI``.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> cli = CurvaDionCLI(BoringModel, args=["--optimizer=CurvaDion", "--optimizer.lr=0.02"], run=False)
        >>> cli.model.configure_optimizers().param_groups[0]["name"]
        'matrices'
    """

    def __init__(self, model_class: Any = None, datamodule_class: Any = None, **options: Any) -> None:
        settings = {
            "parser_class": SuggestingParser,
            "parser_kwargs": {"default_env": True, "description": __doc__},
            "seed_everything_default": 0,
            "save_config_kwargs": {"overwrite": True},
            **options,
        }
        super().__init__(model_class, datamodule_class, auto_configure_optimizers=False, **settings)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--optimizer",
            type=OptimizerCallable | None,
            help="Optimizer by class path or short name; CurvaDion gets the groups of split_parameters. Without it the"
            " module's configure_optimizers counts.",
        )
        parser.add_argument(
            "--lr_scheduler",
            type=LRSchedulerCallable | None,
            help="Schedule of the optimizer's learning rate by class path or short name.",
        )
        parser.add_argument(
            "--lr_interval", type=Literal["epoch", "step"], default="epoch", help="When lr_scheduler moves."
        )
        parser.add_function_arguments(split_parameters, "groups", skip={"module"})
        parser.add_argument(
            "--links",
            type=dict[str, str],
            default={},
            help="Arguments that take the value of another one, such as {model.context: data.context}.",
        )

    @override
    def before_instantiate_classes(self) -> None:
        parser = self._parser(self.subcommand)
        config = self.config[self.subcommand] if self.subcommand else self.config
        for target, source in (config.get("links") or {}).items():
            try:
                config[_place(config, target)] = config[_place(config, source)]
            except KeyError as error:
                parser.error(f"links: there is no argument {error.args[0]}{did_you_mean(error.args[0], _keys(config))}")
        strategy = config.trainer.get("strategy")
        known = [*StrategyRegistry.available_strategies(), *_OTHER_STRATEGIES]
        if isinstance(strategy, str) and strategy not in known:
            parser.error(f"trainer.strategy: there is no strategy {strategy!r}{did_you_mean(strategy, known)}")

    @override
    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        build = self._get(self.config_init, "optimizer")
        if build is None:
            return
        groups = self._get(self.config_init, "groups", default={})
        named = self._get(self.config, "optimizer")["class_path"]
        split = named.endswith(CurvaDion.__name__) or any(value is not None for value in groups.values())
        schedule = self._get(self.config_init, "lr_scheduler")
        interval = self._get(self.config_init, "lr_interval")

        def configure_optimizers(module: pl.LightningModule) -> Any:
            # Called by the Trainer, when the module is complete.
            optimizer = build(split_parameters(module, **groups) if split else module.parameters())
            return optimizer if schedule is None else _with_schedule(optimizer, schedule(optimizer), interval)

        self.model.configure_optimizers = MethodType(configure_optimizers, self.model)


def _with_schedule(optimizer: Optimizer, scheduler: Any, interval: str) -> dict[str, Any]:
    # LightningCLI's ReduceLROnPlateau carries the name of what it watches.
    watched = {"monitor": scheduler.monitor} if hasattr(scheduler, "monitor") else {}
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval, **watched}}


def _place(config: Any, key: str) -> str:
    """Where a configuration holds ``model.context``: there, or in the ``init_args`` of the class it names."""
    head, _, last = key.rpartition(".")
    for place in (key, f"{head}.init_args.{last}"):
        if place in config:
            return place
    raise KeyError(key)


def _keys(config: Any) -> list[str]:
    return [key.replace(".init_args", "") for key in config.keys()]  # noqa: SIM118, a Namespace is no dict


def main(args: ArgsType = None) -> int:
    """Run a command.

    Args:
        args: Command-line arguments; ``None`` takes those of the process.

    Returns:
        The exit status.
    """
    words: Sequence[str] = sys.argv[1:] if args is None else list(args)
    if words and words[0] in _OWN_COMMANDS:
        # Only then: they build on this module, and drawing has needs of its own.
        return import_module(_OWN_COMMANDS[words[0]], __package__).main(list(words[1:]))
    CurvaDionCLI(args=args)
    return 0
