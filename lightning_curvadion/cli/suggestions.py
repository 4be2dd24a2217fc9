"""A command line that answers a typing error with the nearest thing it knows."""

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
    """What to append to an error about a word that is not known.

    Example:
        >>> did_you_mean("max_stepz", ["max_steps", "max_time", "devices"])
        '; did you mean max_steps?'
        >>> did_you_mean("x", ["max_steps"])
        ''
    """
    nearest = get_close_matches(word, list(dict.fromkeys(known)), n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


class SuggestingParser(LightningArgumentParser):
    """LightningCLI's parser, whose errors name the nearest right key, class or option."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> Any:
        super().error(message + self._suggestion(message, ex), ex)

    def _suggestion(self, message: str, error: Exception | None) -> str:
        if found := re.search(r"module '(\S+)' has no attribute '(\S+)'", message):
            return did_you_mean(found[2], dir(sys.modules.get(found[1])))
        if found := re.search(r"unrecognized arguments: --([^\s=]+)", message):
            return did_you_mean(found[1], _options(self)).replace("mean ", "mean --")
        if found := re.search(r"(?:(?:Group|Subcommand) '(\S+)' does not accept option|Option) '(\S+?)'", message):
            refused, group = found[2], found[1]
            known = [key.removeprefix(f"{group}.") for key in _options(_who_refused(error) or self)]
            # A group that does not exist is reported with all that is said to be in it.
            return did_you_mean(refused, known) or did_you_mean(
                refused.partition(".")[0], [key.partition(".")[0] for key in known]
            )
        return ""


def _options(parser: ArgumentParser) -> list[str]:
    """Names of what a parser accepts, of its subcommands' arguments too."""
    options = [action.dest for action in parser._actions]
    for action in parser._actions:
        if isinstance(action, _SubParsersAction):
            options += [option for subparser in action.choices.values() for option in _options(subparser)]
    return options


def _who_refused(error: BaseException | None) -> ArgumentParser | None:
    """The parser of the class whose arguments were wrong: the innermost that the error went through."""
    parser = None
    traceback: TracebackType | None = error.__traceback__ if error is not None else None
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        parser = owner if isinstance(owner, ArgumentParser) else parser
        traceback = traceback.tb_next
    return parser
