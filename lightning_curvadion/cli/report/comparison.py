"""Figures of several runs: loss against bytes sent and against seconds."""

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ...trainer.formatting import byte_unit, format_bytes, format_duration, join_words, shorten_names
from ...trainer.run_metric import loss_text
from .figures import MissingFigure, ReportFigure, in_both_styles
from .logged_run import LoggedRun
from .plotting import (
    DDP_COLOR,
    DDP_LINE_STYLES,
    RUN_COLORS,
    figure_to_png,
    new_figure,
    plot_line,
    set_log_ticks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# Between fewer values of a loss a straight line says nothing of when it passed a level.
MIN_POINTS = 4


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
        ('MissingFigure', 'a ends at 2.2500 after 2 s and b ends at 2.2500 after 2 s.')
    """
    texts = ("Loss against bytes", "sent per replica"), ("Loss against seconds", "seconds of training")
    return [
        in_both_styles(lambda: _plot_against(runs, "bytes_sent", *texts[0], format_bytes)),
        in_both_styles(lambda: _plot_against(runs, "seconds", *texts[1], format_duration)),
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
    ends = [
        f"{name} ends at {loss_text(line[-1])} after {format_spent(curve.spent[-1])}"
        for name, line, curve in zip(names, lines, curves, strict=True)
    ]
    caption = f"{join_words(ends)}."
    common_loss = max(min(line) for line in lines)
    reached = [spent_at(common_loss, curve.spent, line) for curve, line in zip(curves, lines, strict=True)]
    if all(spent is not None for spent in reached):
        costs = [f"{name} after {format_spent(spent)}" for name, spent in zip(names, reached, strict=True) if spent]
        caption += f" All reach a {kind} loss of {loss_text(common_loss)}: {join_words(costs)}, interpolated."
    alt = f"Lines of {kind} loss against {label}, one for each of {join_words(names)}. {caption}"
    caption = f"{caption} {why_left_out}" if left_out else caption
    return ReportFigure(f"compare-{metric}", title, figure_to_png(figure), alt, caption)


def spent_at(loss: float, spent: Sequence[float], losses: Sequence[float]) -> float | None:
    """What a curve had spent when it first reached a loss, interpolated between the values around it.

    Returns:
        ``None`` where the values cannot tell: fewer than ``MIN_POINTS``, or the first one is as low already.

    Example::

        >>> spent_at(2.2, spent=[0, 10, 20, 30], losses=[4.0, 3.0, 2.0, 1.9])
        18.0
        >>> spent_at(2.2, spent=[0, 10, 20], losses=[4.0, 3.0, 2.0])
    """
    reached = next(number for number, value in enumerate(losses) if value <= loss)
    if len(losses) < MIN_POINTS or reached == 0:
        return None
    above, below = losses[reached - 1], losses[reached]
    share = (above - loss) / (above - below)
    return spent[reached - 1] + share * (spent[reached] - spent[reached - 1])


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
