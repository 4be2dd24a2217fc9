"""Errors of the command line: one line for the user, which says what to do."""

from lightning.fabric.utilities.exceptions import MisconfigurationException

_PACKAGE = __name__.partition(".")[0]


class PlanError(ValueError):
    """The arguments or the config do not make a plan."""


class ReportError(Exception):
    """There is nothing to report on, or a library is missing."""


def says_what_to_do(error: Exception) -> bool:
    """Whether an error is a check's of this package or of Lightning: its message is all that a user needs.

    An error of the user's own code, or of torch, needs its traceback.

    Example:
        >>> from lightning_curvadion import EveryNSteps
        >>> try:
        ...     EveryNSteps(0)
        ... except ValueError as error:
        ...     says_what_to_do(error)
        True
        >>> says_what_to_do(ValueError("of the user"))
        False
    """
    # jsonargparse wraps what a class says of its arguments.
    packages = (_PACKAGE, "jsonargparse")
    return isinstance(error, MisconfigurationException) or (
        isinstance(error, ValueError) and _raising_package(error) in packages
    )


def is_same_on_all_ranks(error: Exception) -> bool:
    """Whether an error is a check's of this package, which every rank raises."""
    return _raising_package(error) == _PACKAGE


def _raising_package(error: BaseException) -> str:
    """The package that raised the first cause of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    module = str(traceback.tb_frame.f_globals.get("__name__", "")) if traceback is not None else ""
    return module.partition(".")[0]
