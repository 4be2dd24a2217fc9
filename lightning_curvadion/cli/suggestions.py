"""An argument parser whose errors suggest the nearest known name."""

import re
import sys
from argparse import _SubParsersAction
from collections.abc import Iterable
from difflib import get_close_matches
from types import TracebackType
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override


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


class SuggestingParser(LightningArgumentParser):
    """LightningCLI's parser. Its errors suggest the nearest key, class or option."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> Any:
        super().error(message + self._suggestion(message, ex), ex)

    def _suggestion(self, message: str, error: Exception | None) -> str:
        if match := re.search(r"module '(\S+)' has no attribute '(\S+)'", message):
            return did_you_mean(match[2], dir(sys.modules.get(match[1])))
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
