"""Errors of the commands ``plan`` and ``report``: a message for the user, which says what to do."""


class PlanError(ValueError):
    """The arguments or the config do not make a plan."""


class ReportError(Exception):
    """There is nothing to report on, or a library is missing."""
