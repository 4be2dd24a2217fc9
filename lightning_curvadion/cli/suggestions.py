"""An argument parser whose errors are one line each and suggest the nearest known name."""

import re
import sys
from argparse import _SubParsersAction
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from types import TracebackType
from typing import Any

import lightning.pytorch as pl
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import Strategy, StrategyRegistry
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from ..optim.triggers import Trigger

# What a config names by class.
_BASES = (Optimizer, Trigger, LRScheduler, Strategy, pl.Callback, pl.LightningModule, pl.LightningDataModule)
# Lines of a message of several that are not its reason.
_FRAME = re.compile(
    r"Does not validate against|Subtypes: |Errors:$|Given value|Problem with given class_path|Parser key"
)
# What a value is not beside what was meant: the other types of the argument.
_OTHER_TYPES = re.compile(r"Expected a (<class '(NoneType|str|list)'>|path but )")
_NO_CLASS = re.compile(r"Expected a dot import path string: (\S+)")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A suggestion to append to an error about an unknown word; empty if no known word is close.

    Example:
        >>> did_you_mean("max_stepz", ["max_steps", "max_time", "devices"])
        '; did you mean max_steps?'
        >>> did_you_mean("x", ["max_steps"])
        ''
    """
    matches = get_close_matches(word, list(dict.fromkeys(known)), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def one_line(message: str) -> str:
    """The key and the innermost reason of an error of jsonargparse, which may span many lines.

    Example:
        >>> one_line('''Parser key "trainer.strategy":
        ...   Does not validate against any of the Union subtypes
        ...   Errors:
        ...     - Expected a <class 'str'>
        ...     - Problem with given class_path 'CurvaDionStrategy':
        ...         Parser key "spread":
        ...           Expected a <class 'int'>. Got value: x
        ...   Given value: NestedArg(key='spread', val='x')''')
        "trainer.strategy.spread: Expected a <class 'int'>. Got value: x"
    """
    if "\n" not in message:
        return message
    # A callable class puts its reason behind its type, on the same line.
    lines = [re.sub(r"- Type .* a callable class: ", "- ", line) for line in message.splitlines()]
    reasons = [line for line in lines if line.strip(" -") and not _FRAME.match(line.strip(" -"))]
    reasons = [line for line in reasons if not _OTHER_TYPES.match(line.strip(" -"))] or reasons
    if not reasons:
        return " ".join(message.split())
    # The most indented one: the others are about what contains it.
    reason = max(reasons, key=lambda line: len(line) - len(line.lstrip(" -"))).strip(" -")
    reason = re.sub(r"\.? Got value: (Namespace|NestedArg)\(.*", "", reason)
    given = re.search(r"Given value: (?!Namespace|NestedArg)(\S+?)(\. Got value.*)?$", message, flags=re.M)
    if given and "Got value" not in reason and reason.startswith("Expected a typing"):
        reason += f". Got value: {given[1]}"
    if missing := _NO_CLASS.match(reason):
        reason = f"there is no class {missing[1]}"
    keys = dict.fromkeys(re.findall(r'Parser key "([^"]+)"', message))
    return f"{'.'.join(keys)}: {reason}" if keys else reason


class SuggestingParser(LightningArgumentParser):
    """LightningCLI's parser. Its errors are one line each and suggest the nearest key, class or option."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> Any:
        suggestion = self._suggestion(message, ex)
        # The parser of a class within a config leaves the line to the parser of the config.
        line = one_line(message) if self.exit_on_error else message
        option = re.search(r"NestedArg\(key='([^']+)'", message)
        missing = _NO_CLASS.search(message)
        if self.exit_on_error and option and missing and missing[1] in StrategyRegistry:
            line, suggestion = _option_of_a_name(missing[1], option[1]), ""
        super().error(line if "did you mean" in line else line + suggestion, ex)

    @override
    def print_usage(self, file: Any = None) -> None:
        if any(isinstance(action, _SubParsersAction) for action in self._actions):
            super().print_usage(file)
        else:
            # Of a command's hundred options the error names the one that matters.
            print(f"usage: {self.prog} ...", file=file)

    def _suggestion(self, message: str, error: Exception | None) -> str:
        if match := re.search(r"module '(\S+)' has no attribute '(\S+)'", message):
            return did_you_mean(match[2], dir(sys.modules.get(match[1])))
        if match := _NO_CLASS.search(message):
            return did_you_mean(match[1], [part.__name__ for base in _BASES for part in subclasses(base)])
        if match := re.search(r"unrecognized arguments: --([^\s=]+)", message):
            return did_you_mean(match[1], _option_names(self)).replace("mean ", "mean --")
        if match := re.search(r"(?:(?:Group|Subcommand) '(\S+)' does not accept option|Option) '(\S+?)'", message):
            group, option = match[1], match[2]
            known = [key.removeprefix(f"{group}.") for key in _option_names(_failing_parser(error) or self)]
            # For an unknown group the error names the whole key inside it; only its first part is misspelt.
            return did_you_mean(option, known) or did_you_mean(
                option.partition(".")[0], [key.partition(".")[0] for key in known]
            )
        return ""


def _option_of_a_name(strategy: str, option: str) -> str:
    """The error for an option of a strategy that is given by its registered name."""
    return (
        f"trainer.strategy: {strategy!r} is a name, which takes no options; put --trainer.strategy=CurvaDionStrategy"
        f" before --trainer.strategy.{option}"
    )


def subclasses(base: type[Any]) -> Iterator[type[Any]]:
    """All classes below a class that have been imported."""
    for part in base.__subclasses__():
        yield part
        yield from subclasses(part)


def _option_names(parser: ArgumentParser) -> list[str]:
    """Names of the options of a parser and of its subcommands."""
    names = [action.dest for action in parser._actions]
    for action in parser._actions:
        if isinstance(action, _SubParsersAction):
            names += [name for subparser in action.choices.values() for name in _option_names(subparser)]
    return names


def _failing_parser(error: BaseException | None) -> ArgumentParser | None:
    """The parser of the class whose arguments were wrong: the innermost one in the traceback."""
    parser = None
    traceback: TracebackType | None = error.__traceback__ if error is not None else None
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        parser = owner if isinstance(owner, ArgumentParser) else parser
        traceback = traceback.tb_next
    return parser
