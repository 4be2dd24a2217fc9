"""``python -m lightning_curvadion report RUN_DIR ...``: writes one page with figures of what runs logged."""

import argparse
import sys
from pathlib import Path

from ..errors import ReportError
from .report import build_report


def main(args: list[str]) -> int:
    """Run the command.

    Args:
        args: What follows ``python -m lightning_curvadion report``.

    Returns:
        The exit status: 0, or 2 if there is nothing to report on or the page cannot be written.

    Example::

        >>> import contextlib, io
        >>> with contextlib.redirect_stderr(io.StringIO()) as errors:
        ...     main(["no/such/folder"])
        2
        >>> print(errors.getvalue().strip())
        report: no/such/folder is no directory; give the directory that a logger wrote to
    """
    parser = argparse.ArgumentParser(
        prog="python -m lightning_curvadion report",
        description="Write report.html, one page that works offline, and its figures as PNG files beside it.",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN_DIR", help="log directory of CSVLogger or TensorBoardLogger"
    )
    parser.add_argument("--output", type=Path, default=Path("report"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--loss", metavar="KEY", help="key of the training loss, if it has no usual name")
    parser.add_argument("--val-loss", metavar="KEY", help="key of the validation loss, if it has no usual name")
    options = parser.parse_args(args)
    try:
        page = build_report(options.runs, options.output, options.loss, options.val_loss)
    except (ReportError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(page)
    return 0
