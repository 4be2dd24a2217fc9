"""``python -m lightning_curvadion plan``: predicts what a config would cost on a cluster."""

import sys

from ..errors import PlanError, ReportError
from .arguments import parse_arguments
from .plan import make_plan
from .plan_text import format_plan


def main(args: list[str]) -> int:
    """Run the command.

    Args:
        args: What follows ``python -m lightning_curvadion plan``.

    Returns:
        The exit status: 0, or 2 after a message about bad input.

    Example:
        >>> main(["--link", "fast", "--latency", "1ms"])
        2
    """
    try:
        print(format_plan(make_plan(parse_arguments(args))))
    except (PlanError, ReportError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    return 0
