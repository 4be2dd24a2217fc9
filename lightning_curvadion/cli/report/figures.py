"""The figures of one run. Each is a PNG with its caption, or the reason why it is missing."""

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...trainer.formatting import byte_unit, format_bytes, format_number, join_words, pluralize, shorten_names
from ...trainer.run_metric import loss_text
from .logged_run import LoggedRun, Series
from .plotting import (
    DDP_COLOR,
    DRIFT_COLOR,
    LOSS_COLOR,
    MANY_POINTS,
    RMMC_COLOR,
    SENT_COLOR,
    VAL_LOSS_COLOR,
    figure_to_png,
    label_line_ends,
    new_figure,
    plot_line,
    plot_points,
    plot_style,
    set_integer_ticks,
    set_log_ticks,
    set_step_axis,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class ReportFigure:
    """One figure with its texts.

    Args:
        name: Name of its file, without suffix.
        title: Heading.
        png: The image.
        alt: Alternative text: what is plotted.
        caption: What the figure shows, with the run's own numbers.
        dark_png: The image for a dark page.

    Example::

        >>> ReportFigure("loss", "Loss", b"", "A falling line.", "From 2.5 to 2.25.").name
        'loss'
    """

    name: str
    title: str
    png: bytes
    alt: str
    caption: str
    dark_png: bytes = b""


@dataclass(frozen=True)
class MissingFigure:
    """A figure that cannot be plotted, and why.

    Example::

        >>> MissingFigure("Drift at each sync", "Replicas under DDP never drift.").title
        'Drift at each sync'
    """

    title: str
    reason: str


def plot_run(run: LoggedRun) -> list[ReportFigure | MissingFigure]:
    """Plot the figures of one run.

    Raises:
        ReportError: Matplotlib is not installed.

    Example::

        >>> from pathlib import Path
        >>> figures = plot_run(LoggedRun("mine", Path(), {"loss": Series([9, 19], [2.5, 2.25])}))
        >>> [(type(figure).__name__, figure.title) for figure in figures][0]
        ('ReportFigure', 'Loss and RMMC')
    """
    if not run.has_monitor:
        reason = "The run had no CommunicationMonitor: give its Trainer callbacks=[CommunicationMonitor()]."
        missing = MissingFigure("Bytes, gaps between sync steps, RMMC by layer, drift", reason)
        return [in_both_styles(lambda: _plot_training(run)), missing]
    plots = (_plot_training, _plot_bytes, _plot_gaps, _plot_layers, _plot_drift)
    return [in_both_styles(functools.partial(plot, run)) for plot in plots]


def in_both_styles(plot: Callable[[], ReportFigure | MissingFigure]) -> ReportFigure | MissingFigure:
    """Plot a figure twice: on white, and for a dark page.

    Raises:
        ReportError: Matplotlib is not installed.

    Example::

        >>> in_both_styles(lambda: MissingFigure("Drift at each sync", "Replicas under DDP never drift.")).title
        'Drift at each sync'
    """
    with plot_style():
        figure = plot()
    if isinstance(figure, ReportFigure):
        with plot_style(dark=True):
            dark = plot()
        assert isinstance(dark, ReportFigure)
        figure = replace(figure, dark_png=dark.png)
    return figure


# -- loss, RMMC and sync steps ---------------------------------------------------------------------------------------


def _plot_training(run: LoggedRun) -> ReportFigure | MissingFigure:
    """Panels for losses, RMMC and sync steps, one below another over the same steps."""
    title = "Loss and RMMC"
    both = (("training", run.loss.finite(), LOSS_COLOR), ("validation", run.val_loss.finite(), VAL_LOSS_COLOR))
    losses = [loss for loss in both if len(loss[1]) > 1]
    rmmc, syncs = run.metric("rmmc").finite(), run.sync_steps
    heights = {"loss": 2.5 if losses else 0, "RMMC": 1.7 if len(rmmc) > 1 else 0, "syncs": 0.3 if syncs else 0}
    heights = {panel: height for panel, height in heights.items() if height}
    missing = [*_explain_missing_losses(run), *_explain_missing_rmmc(run)]
    if not {"loss", "RMMC"} & heights.keys():
        return MissingFigure(title, " ".join(missing))
    figure = new_figure(0.6 + sum(heights.values()))
    grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=list(heights.values()))
    panels = dict(zip(heights, grid[:, 0], strict=True))
    caption = _draw_losses(panels["loss"], losses) if losses else []
    if "RMMC" in panels:
        caption.append(_draw_rmmc(panels["RMMC"], rmmc))
    if syncs:
        _draw_sync_steps(panels["syncs"], syncs, run.num_steps)
        shading = ", darker where more" if len(syncs) > MANY_POINTS else ""
        caption.append(f"Green marks {pluralize(len(syncs), 'sync step')}{shading}.")
    if any(len(series) > MANY_POINTS for series in [rmmc, *(series for _, series, _ in losses)]):
        caption.append("Strong lines are running means, faint lines the logged values.")
    set_step_axis(grid[-1, 0], run.num_steps)
    lines = join_words([*(f"{name} loss" for name, _, _ in losses), *(["RMMC"] if "RMMC" in panels else [])])
    alt = f"Lines of {lines} over {run.num_steps} optimizer steps{', and a mark at each sync step' if syncs else ''}."
    return ReportFigure("training", title, figure_to_png(figure), alt, " ".join([*caption, *missing]))


def _draw_losses(axes: "Axes", losses: Sequence[tuple[str, Series, str]]) -> list[str]:
    """Draw (name, loss, color) and return a sentence about each."""
    sentences, labels = [], []
    for name, series, color in losses:
        marker = "o" if name == "validation" else None
        line = plot_line(axes, series.steps, series.values, color=color, marker=marker)
        first, last = loss_text(line[0]), loss_text(line[-1])
        sentences.append(f"The {name} loss goes from {first} to {last}.")
        labels.append((line[-1], f"{name}\n{last}", color))
    axes.set_ylabel("loss")
    label_line_ends(axes, labels)
    return sentences


def _draw_rmmc(axes: "Axes", rmmc: Series) -> str:
    """Draw the largest RMMC and return a sentence about it."""
    plot_line(axes, rmmc.steps, rmmc.values, color=RMMC_COLOR)
    axes.set_ylabel("largest RMMC")
    if max(rmmc.values) >= 10 * min(rmmc.values) > 0:
        axes.set_yscale("log")
        set_log_ticks(axes.yaxis, rmmc.values)
    else:
        axes.set_ylim(bottom=0)
    median, maximum = format_number(statistics.median(rmmc.values)), format_number(max(rmmc.values))
    return (
        f"The largest RMMC of all layers and replicas has a median of {median} and a maximum of {maximum}"
        f" (step {rmmc.step_of_max})."
    )


def _draw_sync_steps(axes: "Axes", syncs: list[int], num_steps: int) -> None:
    """Draw a mark per sync step; with many of them, their density as a shade."""
    from matplotlib import rcParams
    from matplotlib.colors import LinearSegmentedColormap

    if len(syncs) > MANY_POINTS:
        shade = LinearSegmentedColormap.from_list("syncs", [rcParams["axes.facecolor"], SENT_COLOR])
        axes.hist2d(syncs, [0.5] * len(syncs), bins=[100, 1], range=[[0, num_steps], [0, 1]], cmap=shade, vmin=0)
    else:
        axes.vlines(syncs, 0, 1, color=SENT_COLOR, linewidth=1)
    axes.set_yticks([0.5], ["syncs"], color=SENT_COLOR)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(0, 1)
    axes.grid(False)


def _explain_missing_losses(run: LoggedRun) -> list[str]:
    """A sentence for each loss that gives no line, or a line with holes."""
    sentences = []
    for name, series, option in (("training", run.loss, "--loss"), ("validation", run.val_loss, "--val-loss")):
        finite = series.finite()
        if not series:
            sentences.append(f"No {name} loss was logged under a usual name; {option} KEY takes one of {run.own_keys}.")
        elif len(finite) < 2:
            value = "no finite value"
            if finite:
                value = f"only one finite value, {loss_text(finite.last)} at step {finite.steps[-1]}"
            sentences.append(f"The {name} loss has {value}.")
        elif len(finite) < len(series):
            bad = [step for step, value in zip(series.steps, series.values, strict=True) if not math.isfinite(value)]
            sentences.append(f"The {name} loss is not finite in {pluralize(len(bad), 'row')}, first at step {bad[0]}.")
    return sentences


def _explain_missing_rmmc(run: LoggedRun) -> list[str]:
    rmmc = run.metric("rmmc")
    sentences = ["Under DDP every step synchronises."] if run.is_ddp else []
    if run.has_monitor and not rmmc:
        sentences.append("No RMMC was logged: only CurvaDion measures it.")
    elif run.has_monitor and len(rmmc.finite()) < 2:
        logged, finite = pluralize(len(rmmc), "time"), pluralize(len(rmmc.finite()), "time")
        sentences.append(f"RMMC was logged {logged} and finite {finite}: a line needs two finite values.")
    return sentences


# -- communication ---------------------------------------------------------------------------------------------------


def _plot_bytes(run: LoggedRun) -> ReportFigure | MissingFigure:
    title = "Bytes sent"
    sent, ddp = run.metric("bytes_sent").finite(), run.ddp_bytes.finite()
    if run.is_ddp:
        return MissingFigure(title, f"The run used DDP: it sent {format_bytes(sent.last)} in {run.num_steps} steps.")
    if len(sent) < 2 or len(ddp) < 2 or ddp.last <= 0:
        reason = "This needs two logged rows of bytes sent and saved; a smaller log_every_n_steps gives more rows."
        return MissingFigure(title, reason)
    figure = new_figure(3.0)
    axes = figure.subplots()
    scale, unit = byte_unit(ddp.last)
    labels = []
    sent_text, ddp_text = run.table["sent per replica"], run.table["DDP would have sent"]
    for series, color, label in ((sent, SENT_COLOR, f"this run\n{sent_text}"), (ddp, DDP_COLOR, f"DDP\n{ddp_text}")):
        axes.plot(series.steps, [value / scale for value in series.values], color=color)
        labels.append((series.last / scale, label, color))
    axes.set_ylabel(f"sent so far per replica, {unit}")
    set_step_axis(axes, run.num_steps)
    if ddp.last >= 5 * sent.last > 0:
        axes.set_yscale("log")
        set_log_ticks(axes.yaxis, [value / scale for value in (*sent.values, *ddp.values) if value > 0])
    else:
        axes.set_ylim(bottom=0)
    label_line_ends(axes, labels)
    share = f"{run.table['share of DDP']} of the {ddp_text} that DDP would have sent"
    caption = f"Up to step {sent.steps[-1]} this replica sent {sent_text}, {share}."
    alt = f"Two rising lines over the steps: bytes that this run sent, and bytes that DDP would have sent. {caption}"
    return ReportFigure("bytes", title, figure_to_png(figure), alt, caption)


def _plot_gaps(run: LoggedRun) -> ReportFigure | MissingFigure:
    title = "Gaps between sync steps"
    gaps = run.sync_gaps
    if run.is_ddp:
        return MissingFigure(title, "Under DDP every step synchronises.")
    if not gaps:
        return MissingFigure(title, f"This needs two logged sync steps; the run has {len(run.sync_steps) or 'none'}.")
    figure = new_figure(2.8)
    over_steps, histogram = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1])
    plot_points(over_steps, gaps, SENT_COLOR)
    over_steps.set_ylabel("steps since previous sync")
    set_step_axis(over_steps, run.num_steps)
    longest = max(gaps.values)
    bin_width = max(1, math.ceil(longest / 25))
    edges = [0.5 + bin_width * number for number in range(math.ceil(longest / bin_width) + 1)]
    histogram.hist(gaps.values, bins=edges, orientation="horizontal", color=SENT_COLOR, rwidth=0.85)
    histogram.set_xlabel("count")
    over_steps.set_ylim(0, edges[-1] + 0.02 * longest)
    set_integer_ticks(over_steps.yaxis)
    set_integer_ticks(histogram.xaxis, 2)
    caption = f"{pluralize(len(gaps), 'gap')} with a median of {format_number(statistics.median(gaps.values))} steps."
    caption += f" The longest, {format_number(longest)} steps, ends at step {gaps.step_of_max}."
    halves: list[list[float]] = [[], []]
    for step, gap in zip(gaps.steps, gaps.values, strict=True):
        halves[2 * step >= run.num_steps].append(gap)
    if all(halves):
        first, second = (format_number(statistics.fmean(half)) for half in halves)
        caption += f" The mean is {first} in the first half of the run and {second} in the second."
    alt = f"A point for each sync step at the number of steps since the previous one, and a histogram. {caption}"
    return ReportFigure("gaps", title, figure_to_png(figure), alt, caption)


def _plot_layers(run: LoggedRun) -> ReportFigure | MissingFigure:
    title = "RMMC by layer"
    if not run.rmmc_by_layer:
        return MissingFigure(title, "No RMMC was logged: only CurvaDion measures it.")
    layers = {name: series.finite() for name, series in run.rmmc_by_layer.items() if series.finite()}
    steps = sorted({step for series in layers.values() for step in series.steps})
    positive = [value for series in layers.values() for value in series.values if value > 0]
    if len(steps) < 2 or not positive:
        logged = "one step" if len(steps) == 1 else "no step"
        return MissingFigure(title, f"Finite positive values were logged at {logged}; a heat map needs two.")
    figure = new_figure(min(9.0, 1.3 + 0.24 * len(layers)))
    _draw_heat_map(figure.subplots(), layers, steps, positive, run.num_steps)
    medians = {name: statistics.median(series.values) for name, series in layers.items()}
    most, least = max(medians, key=medians.__getitem__), min(medians, key=medians.__getitem__)
    caption = f"{pluralize(len(layers), 'layer')} at {len(steps)} logged steps on this replica; brighter is larger."
    caption += f" {most} has the largest median ({format_number(medians[most])})"
    caption += f", {least} the smallest ({format_number(medians[least])})." if most != least else "."
    alt = f"Heat map of RMMC: layers from top to bottom, steps from left to right. {caption}"
    return ReportFigure("layers", title, figure_to_png(figure), alt, caption)


def _draw_heat_map(
    axes: "Axes", layers: dict[str, Series], steps: Sequence[int], positive: Sequence[float], num_steps: int
) -> None:
    """Draw RMMC over layers and steps; ``positive`` are the values that set the range of the colours."""
    from matplotlib.colors import LogNorm

    rows = [dict(zip(series.steps, series.values, strict=True)) for series in layers.values()]
    low, high = min(positive), max(positive)
    cells = [[max(row[step], low) if step in row else math.nan for step in steps] for row in rows]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(steps)]
    edges = [2 * steps[0] - middles[0], *middles, 2 * steps[-1] - middles[-1]]
    norm = LogNorm(low, max(high, 1.01 * low))
    image = axes.pcolormesh(edges, range(len(layers) + 1), cells, norm=norm, cmap="viridis")
    every = math.ceil(len(layers) / 32)
    axes.set_yticks([row + 0.5 for row in range(0, len(layers), every)], shorten_names(list(layers))[::every])
    axes.invert_yaxis()
    axes.grid(False)
    set_step_axis(axes, num_steps)
    axes.set_xlim(edges[0], edges[-1])
    figure = axes.get_figure(root=True)
    assert figure is not None
    bar = figure.colorbar(image, label="RMMC", pad=0.02)
    set_log_ticks(bar.ax.yaxis, positive)


def _plot_drift(run: LoggedRun) -> ReportFigure | MissingFigure:
    title = "Drift at each sync"
    drift = run.metric("drift").finite()
    if run.is_ddp:
        return MissingFigure(title, "Replicas under DDP never drift.")
    if not drift:
        return MissingFigure(title, "No sync step logged its drift.")
    syncs = set(run.sync_steps)
    points = [(step, 100 * value) for step, value in zip(drift.steps, drift.values, strict=True)]
    at_sync_steps, between = ([p for p in points if (p[0] in syncs) == inside] for inside in (True, False))
    figure = new_figure(2.8)
    axes = figure.subplots()
    hollow = {"markerfacecolor": axes.get_facecolor(), "markeredgewidth": 1.2}
    for group, style in ((at_sync_steps, {}), (between, hollow)):
        plot_points(axes, Series([step for step, _ in group], [value for _, value in group]), DRIFT_COLOR, **style)
    axes.set(ylabel="distance to the consensus,\n% of its norm", ylim=(0, None))
    set_step_axis(axes, run.num_steps)
    median = format_number(statistics.median(value for _, value in points))
    maximum = format_number(max(value for _, value in points))
    caption = f"Just before a consensus, this replica's distance to it was {median} % of its norm in the median and"
    caption += f" {maximum} % at most (step {drift.step_of_max}). Filled: {pluralize(len(at_sync_steps), 'sync step')}."
    if between:
        caption += f" Open: {pluralize(len(between), 'point')} between steps, such as before a validation."
    alt = f"A point for each consensus at the distance of this replica to it. {caption}"
    return ReportFigure("drift", title, figure_to_png(figure), alt, caption)
