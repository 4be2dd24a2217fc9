"""Figures of several runs: loss against bytes sent and against seconds."""

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..formatting import byte_unit, format_bytes, format_number, join_words, shorten_names
from .figures import MissingFigure, ReportFigure
from .logged_run import LoggedRun
from .plotting import (
    DDP_COLOR,
    DDP_LINE_STYLES,
    RUN_COLORS,
    figure_to_png,
    new_figure,
    plot_line,
    plot_style,
    set_log_ticks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class LossCurve(NamedTuple):
    """The losses of a run, and what it had spent (bytes or seconds) when it reached each.

    Example::

        >>> from pathlib import Path
        >>> LossCurve(LoggedRun("mine", Path(), {}), [1e6, 2e6], [2.5, 2.25]).spent[-1]
        2000000.0
    """

    run: LoggedRun
    spent: list[float]
    loss: list[float]


def plot_comparison(runs: Sequence[LoggedRun]) -> list[ReportFigure | MissingFigure]:
    """Plot the loss of several runs against the bytes they sent and the seconds they took.

    It is the validation loss if every run has three or more values of it, else the training loss.

    Raises:
        ReportError: Matplotlib is not installed.

    Example::

        >>> from pathlib import Path
        >>> from lightning_curvadion.cli.report.logged_run import Series
        >>> series = {"loss": Series([9, 19], [2.5, 2.25]), "curvadion/seconds": Series([9, 19], [1.0, 2.0])}
        >>> figures = plot_comparison([LoggedRun("a", Path(), series), LoggedRun("b", Path(), series)])
        >>> type(figures[0]).__name__, figures[1].caption
        ('MissingFigure', 'All reach a training loss of 2.25: a after 2 s and b after 2 s.')
    """
    with plot_style():
        return [
            _plot_against(runs, "bytes_sent", "Loss against bytes", "sent per replica", format_bytes),
            _plot_against(
                runs, "seconds", "Loss against seconds", "seconds of training", lambda s: f"{format_number(s)} s"
            ),
        ]


def _plot_against(
    runs: Sequence[LoggedRun], metric: str, title: str, label: str, format_spent: Callable[[float], str]
) -> ReportFigure | MissingFigure:
    """Plot the loss of each run against a metric of CommunicationMonitor."""
    validated = all(len(run.val_loss.finite()) > 2 for run in runs)
    kind = "validation" if validated else "training"
    curves = _loss_curves(runs, metric, validated)
    names = [curve.run.name for curve in curves]
    left_out = [run.name for run in runs if run.name not in names]
    why_left_out = f"Without a line: {join_words(left_out)} (no {kind} loss or no curvadion/{metric} in the logs)."
    if len(curves) < 2:
        return MissingFigure(title, why_left_out)
    figure = new_figure(3.7)
    axes = figure.subplots()
    scale, unit = byte_unit(max(curve.spent[-1] for curve in curves)) if metric == "bytes_sent" else (1.0, "")
    lines = _draw_curves(axes, curves, scale, marker="o" if validated else None)
    axes.set(xlabel=f"{label}, {unit}" if unit else label, ylabel=f"{kind} loss")
    figure.legend(loc="outside upper left", ncols=3 if max(map(len, names)) <= 14 else 2)
    common_loss = max(min(line) for line in lines)
    reached = [
        next(spent for spent, loss in zip(curve.spent, line, strict=True) if loss <= common_loss)
        for curve, line in zip(curves, lines, strict=True)
    ]
    costs = [f"{name} after {format_spent(spent)}" for name, spent in zip(names, reached, strict=True)]
    caption = f"All reach a {kind} loss of {format_number(common_loss)}: {join_words(costs)}."
    alt = f"Lines of {kind} loss against {label}, one for each of {join_words(names)}. {caption}"
    caption = f"{caption} {why_left_out}" if left_out else caption
    return ReportFigure(f"compare-{metric}", title, figure_to_png(figure), alt, caption)


def _loss_curves(runs: Sequence[LoggedRun], metric: str, validated: bool) -> list[LossCurve]:
    """Curves of the runs that logged both the loss and the metric."""
    curves = []
    for run in runs:
        loss, spent = (run.val_loss if validated else run.loss).finite(), run.metric(metric).finite()
        if len(loss) > 1 and spent:
            curves.append(LossCurve(run, [spent.at(step) for step in loss.steps], loss.values))
    return curves


def _draw_curves(axes: "Axes", curves: Sequence[LossCurve], scale: float, marker: str | None) -> list[Sequence[float]]:
    """Draw the curves, on a logarithmic axis if they end far apart. Returns the values of the lines."""
    colors, line_styles = itertools.cycle(RUN_COLORS), itertools.cycle(DDP_LINE_STYLES)
    lines = []
    for curve, label in zip(curves, shorten_names([curve.run.name for curve in curves], 28), strict=True):
        color, line_style = (DDP_COLOR, next(line_styles)) if curve.run.is_ddp else (next(colors), "-")
        x = [spent / scale for spent in curve.spent]
        lines.append(plot_line(axes, x, curve.loss, color=color, linestyle=line_style, marker=marker, label=label))
    ends = [curve.spent[-1] for curve in curves]
    if max(ends) >= 5 * min(ends) and min(min(curve.spent) for curve in curves) > 0:
        axes.set_xscale("log")
        set_log_ticks(axes.xaxis, [spent / scale for curve in curves for spent in curve.spent])
    return lines
