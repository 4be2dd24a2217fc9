"""The command line: ``curvadion {fit,validate,test,predict} --config FILE``, or ``python -m lightning_curvadion``.

Three more commands: ``report`` plots what a run has logged, ``plan`` predicts what a run would cost, and ``store``
holds the address at which replicas that come and go meet.
"""

import sys
from argparse import _SubParsersAction
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import lightning.pytorch as pl
from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, LRSchedulerCallable
from lightning.pytorch.strategies import Strategy, StrategyRegistry
from lightning.pytorch.utilities import rank_zero_only
from torch.optim import Optimizer
from typing_extensions import override

from ..optim.curvadion import CurvaDion
from ..optim.split_parameters import split_parameters
from .errors import is_same_on_all_ranks, says_what_to_do
from .suggestions import SuggestingParser, did_you_mean, one_line, subclasses

OptimizerCallable = Callable[[Iterable[Any]], Optimizer]
# Strategy names of the Trainer that its registry does not list.
_UNREGISTERED_STRATEGIES = ("auto", "hpu_parallel", "hpu_single")
# Imported when called: they import this module, and need libraries that training does not.
_EXTRA_COMMANDS = {
    "plan": (".plan.command", "Predict what a run would send and cost."),
    "report": (".report.command", "Plot what runs have logged."),
    "store": (".store", "Hold the address of runs whose replicas come and go."),
}
_OPTIONS_HINT = (
    "The options of a class: --optimizer.help=CurvaDion, --trainer.strategy.help=CurvaDionStrategy; of a trigger:"
    " --optimizer=CurvaDion --optimizer.trigger.help=IntegratedRMMC."
)


class CurvaDionCLI(LightningCLI):
    """LightningCLI for training with CurvaDion: the optimizer and its parameter groups come from the config.

    Settings come from the command line, from ``--config`` files (later ones win) and from environment variables such as
    ``PL_FIT__TRAINER__MAX_STEPS``. LightningCLI's keys are extended by

    - ``optimizer``: any optimizer. :class:`~lightning_curvadion.CurvaDion` gets the groups of
      :func:`~lightning_curvadion.split_parameters`. The module needs no ``configure_optimizers``.
    - ``groups``: arguments of ``split_parameters``. If given, other optimizers get these groups too.
    - ``lr_scheduler``, and ``lr_interval``: whether it steps after every step or every epoch.
    - ``links``: arguments that copy another one's value, such as ``{model.context: data.context}``.

    Args:
        model_class: The module; by default any, named by ``model.class_path``.
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
            "parser_kwargs": {
                "default_env": True,
                "description": __doc__,
                **{command: {"epilog": _OPTIONS_HINT} for command in self.subcommands()},
            },
            "seed_everything_default": 0,
            "save_config_kwargs": {"overwrite": True},
            **options,
        }
        super().__init__(model_class, datamodule_class, auto_configure_optimizers=False, **settings)

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        # As Lightning's own. Its argument parser_class is younger than the oldest version that we support.
        parser = SuggestingParser(**{"dump_header": [f"lightning.pytorch=={version('lightning')}"], **kwargs})
        parser.add_argument(
            "-c", "--config", action=ActionConfigFile, help="Path to a configuration file in json or yaml format."
        )
        return parser

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--optimizer",
            type=OptimizerCallable | None,
            help="Optimizer by class path or short name. CurvaDion gets the groups of split_parameters. Without it, the"
            " module's configure_optimizers is used.",
        )
        parser.add_argument(
            "--lr_scheduler",
            type=LRSchedulerCallable | None,
            help="Learning-rate scheduler by class path or short name.",
        )
        parser.add_argument(
            "--lr_interval", type=Literal["epoch", "step"], default="epoch", help="When lr_scheduler steps."
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
                config[_config_key(config, target)] = config[_config_key(config, source)]
            except KeyError as error:
                suggestion = did_you_mean(error.args[0], _argument_names(config))
                parser.error(f"links: there is no argument {error.args[0]}{suggestion}")
        strategy = config.trainer.get("strategy")
        names = [*StrategyRegistry.available_strategies(), *_UNREGISTERED_STRATEGIES]
        if not isinstance(strategy, str) or strategy in names:
            return
        classes = [part.__name__ for part in subclasses(Strategy)]
        if "." not in strategy and strategy not in classes:
            suggestion = did_you_mean(strategy, [*names, *classes])
            parser.error(f"trainer.strategy: there is no strategy {strategy!r}{suggestion}")
        # The Trainer takes a name or an object, so that the parser takes any word for a name.
        settings: dict[str, Any] = {"trainer": {"strategy": {"class_path": strategy}}}
        self.config = self.parser.parse_object(
            {self.subcommand: settings} if self.subcommand else settings, self.config
        )

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (ValueError, MisconfigurationException) as error:
            if not says_what_to_do(error):
                raise
            self._parser(self.subcommand).error(one_line(str(error)))
        build_optimizer = self._get(self.config_init, "optimizer")
        if build_optimizer is None:
            return
        groups = self._get(self.config_init, "groups", default={})
        class_path = self._get(self.config, "optimizer")["class_path"]
        split = class_path.endswith(CurvaDion.__name__) or any(value is not None for value in groups.values())
        build_scheduler = self._get(self.config_init, "lr_scheduler")
        interval = self._get(self.config_init, "lr_interval")

        def configure_optimizers(module: pl.LightningModule) -> Any:
            # The Trainer calls it once the module is complete, after configure_model.
            optimizer = build_optimizer(split_parameters(module, **groups) if split else module.parameters())
            if build_scheduler is None:
                return optimizer
            return _optimizer_config(optimizer, build_scheduler(optimizer), interval)

        self.model.configure_optimizers = MethodType(configure_optimizers, self.model)


def _optimizer_config(optimizer: Optimizer, scheduler: Any, interval: str) -> dict[str, Any]:
    """What ``configure_optimizers`` returns for an optimizer with a scheduler."""
    # LightningCLI's ReduceLROnPlateau carries the name of the metric it monitors.
    monitor = {"monitor": scheduler.monitor} if hasattr(scheduler, "monitor") else {}
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval, **monitor}}


def _config_key(config: Any, name: str) -> str:
    """The key of an argument such as ``model.context``; it may be in the ``init_args`` of a class."""
    head, _, last = name.rpartition(".")
    for key in (name, f"{head}.init_args.{last}"):
        if key in config:
            return key
    raise KeyError(name)


def _argument_names(config: Any) -> list[str]:
    return [key.replace(".init_args", "") for key in config.keys()]  # noqa: SIM118, a Namespace is no dict


class _Program(CurvaDionCLI):
    """The command line of this package, whose usage names all commands."""

    @override
    def setup_parser(self, add_subcommands: bool, main_kwargs: Any, subparser_kwargs: Any) -> None:
        module = Path(sys.argv[0]).name == "__main__.py"
        main_kwargs = {**main_kwargs, "prog": "python -m lightning_curvadion" if module else "curvadion"}
        super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
        commands: Any
        (commands,) = (action for action in self.parser._actions if isinstance(action, _SubParsersAction))
        for name, (_, summary) in _EXTRA_COMMANDS.items():
            # main() runs them; here they are named.
            commands.add_subcommand(name, ArgumentParser(), help=summary)


def main(args: ArgsType = None) -> int:
    """Run a command.

    Args:
        args: Command-line arguments; ``None`` takes those of the process.

    Returns:
        The exit status.
    """
    words: Sequence[str] = sys.argv[1:] if args is None else list(args)
    if words and words[0] in _EXTRA_COMMANDS:
        return import_module(_EXTRA_COMMANDS[words[0]][0], __package__).main(list(words[1:]))
    try:
        _Program(args=args)
    except (ValueError, MisconfigurationException) as error:
        if not says_what_to_do(error):
            raise
        # Once, not once a rank.
        if getattr(rank_zero_only, "rank", 0) == 0 or not is_same_on_all_ranks(error):
            print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def program() -> int:
    """The console script ``curvadion``: as ``python -m lightning_curvadion``, with modules of the working folder."""
    sys.path.insert(0, "")
    return main()
