"""Several runs in one figure: their losses against what they spent."""

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from .plotting import (
    DASHES,
    DDP,
    RUNS,
    as_png,
    bytes_told,
    draw_line,
    listed,
    log_ticks,
    new_figure,
    shortened,
    style,
    told,
    unit_of,
)
from .figures import Drawing, Missing
from .log_readers import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Curve(NamedTuple):
    """What a run had spent when it had each loss.

    Example::

        >>> from pathlib import Path
        >>> Curve(Run("mine", Path(), {}), [1e6, 2e6], [2.5, 2.25]).spent[-1]
        2000000.0
    """

    run: Run
    spent: list[float]
    loss: list[float]


def draw_comparison(runs: Sequence[Run]) -> list[Drawing | Missing]:
    """The loss of several runs against the bytes they sent and the seconds they took.

    The validation loss where every run has three values of it or more, else the training loss.

    Raises:
        ReportError: If matplotlib is not installed.

    Example::

        >>> from pathlib import Path
        >>> from lightning_curvadion.cli.report.log_readers import Series
        >>> series = {"loss": Series([9, 19], [2.5, 2.25]), "curvadion/seconds": Series([9, 19], [1.0, 2.0])}
        >>> drawn = draw_comparison([Run("a", Path(), series), Run("b", Path(), series)])
        >>> type(drawn[0]).__name__, drawn[1].caption
        ('Missing', 'All of them reach a training loss of 2.25: a after 2 s and b after 2 s.')
    """
    with style():
        return [
            _against(runs, "bytes_sent", "Loss against bytes", "sent per replica", bytes_told),
            _against(runs, "seconds", "Loss against seconds", "seconds of training", lambda value: f"{told(value)} s"),
        ]


def _against(
    runs: Sequence[Run], name: str, title: str, spent_on: str, unit: Callable[[float], str]
) -> Drawing | Missing:
    """Loss of each run against what it spent, which CommunicationMonitor logged under ``name``."""
    validated = all(len(run.val_loss.finite()) > 2 for run in runs)
    kind = "validation" if validated else "training"
    curves: list[Curve] = []
    for run in runs:
        loss, logged = (run.val_loss if validated else run.loss).finite(), run.named(name).finite()
        if len(loss) > 1 and logged:
            curves.append(Curve(run, [logged.at(step) for step in loss.steps], loss.values))
    drawn = [curve.run.name for curve in curves]
    left_out = [run.name for run in runs if run.name not in drawn]
    lacking = f"Without a line: {listed(left_out)}, of which no {kind} loss or no curvadion/{name} is in the logs."
    if len(curves) < 2:
        return Missing(title, lacking)
    figure = new_figure(3.7)
    axes = figure.subplots()
    scale, suffix = unit_of(max(curve.spent[-1] for curve in curves)) if name == "bytes_sent" else (1.0, "")
    lines = _draw_curves(axes, curves, scale, marker="o" if validated else None)
    axes.set(xlabel=f"{spent_on}, {suffix}" if suffix else spent_on, ylabel=f"{kind} loss")
    figure.legend(loc="outside upper left", ncols=3 if max(map(len, drawn)) <= 14 else 2)
    goal = max(min(line) for line in lines)
    firsts = [
        f"{curve.run.name} after {unit(next(x for x, loss in zip(curve.spent, line, strict=True) if loss <= goal))}"
        for curve, line in zip(curves, lines, strict=True)
    ]
    caption = f"All of them reach a {kind} loss of {told(goal)}: {listed(firsts)}."
    alt = f"Lines of {kind} loss against {spent_on}, one for each of {listed(drawn)}. {caption}"
    return Drawing(f"compare-{name}", title, as_png(figure), alt, f"{caption} {lacking}" if left_out else caption)


def _draw_curves(axes: "Axes", curves: Sequence[Curve], scale: float, marker: str | None) -> list[Sequence[float]]:
    """The lines, DDP's in its own colour; a logarithmic axis where they end far apart. Returns their heights."""
    colors, dashes = itertools.cycle(RUNS), itertools.cycle(DASHES)
    lines = []
    for curve, label in zip(curves, shortened([curve.run.name for curve in curves], 28), strict=True):
        color, dash = (DDP, next(dashes)) if curve.run.is_ddp else (next(colors), "-")
        x = [spent / scale for spent in curve.spent]
        lines.append(draw_line(axes, x, curve.loss, color=color, linestyle=dash, marker=marker, label=label))
    ends = [curve.spent[-1] for curve in curves]
    if max(ends) >= 5 * min(ends) and min(min(curve.spent) for curve in curves) > 0:
        axes.set_xscale("log")
        log_ticks(axes.xaxis, [spent / scale for curve in curves for spent in curve.spent])
    return lines
