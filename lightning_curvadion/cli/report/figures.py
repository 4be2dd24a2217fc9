"""The figures of a run's report: each a PNG with the words that belong to it, or the reason why there is none."""

import itertools
import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .plotting import (
    DDP,
    DRIFT,
    LOSS,
    MANY,
    RMMC,
    SENT,
    VAL_LOSS,
    as_png,
    bytes_told,
    counted,
    draw_dots,
    draw_line,
    label_ends,
    listed,
    log_ticks,
    new_figure,
    over_steps,
    shortened,
    style,
    told,
    unit_of,
    where_largest,
    whole_ticks,
)
from .log_readers import Run, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Drawing:
    """One figure and its words.

    Args:
        name: Of its file, without ending.
        title: Heading.
        png: The picture.
        alt: What is drawn, for who does not see it.
        caption: What is seen, with the run's own figures.

    Example::

        >>> Drawing("loss", "Loss", b"", "A falling line.", "From 2.5 to 2.25.").name
        'loss'
    """

    name: str
    title: str
    png: bytes
    alt: str
    caption: str


@dataclass(frozen=True)
class Missing:
    """A figure that there is not, and why.

    Example::

        >>> Missing("Drift at each sync", "Plain DDP's replicas never drift apart.").title
        'Drift at each sync'
    """

    title: str
    reason: str


def draw_run(run: Run) -> list[Drawing | Missing]:
    """The figures of one run.

    Raises:
        ReportError: If matplotlib is not installed.

    Example::

        >>> from pathlib import Path
        >>> figures = draw_run(Run("mine", Path(), {"loss": Series([9, 19], [2.5, 2.25])}))
        >>> [(type(figure).__name__, figure.title) for figure in figures][0]
        ('Drawing', 'Loss and RMMC')
    """
    with style():
        if not run.monitored:
            reason = "The run had no CommunicationMonitor: give its Trainer callbacks=[CommunicationMonitor()]."
            return [_training(run), Missing("Bytes, gaps between sync steps, RMMC by layer and drift", reason)]
        return [_training(run), _bytes(run), _gaps(run), _layers(run), _drift(run)]


def _training(run: Run) -> Drawing | Missing:
    """Losses, RMMC and the sync steps, above one another over the same steps."""
    title = "Loss and RMMC"
    both = (("training", run.loss.finite(), LOSS), ("validation", run.val_loss.finite(), VAL_LOSS))
    losses = [entry for entry in both if len(entry[1]) > 1]
    rmmc, syncs = run.named("rmmc").finite(), run.sync_steps
    heights = {"loss": 2.5 if losses else 0, "RMMC": 1.7 if len(rmmc) > 1 else 0, "syncs": 0.3 if syncs else 0}
    heights = {name: height for name, height in heights.items() if height}
    absent = [*_lacking_losses(run), *_lacking_rmmc(run)]
    if not {"loss", "RMMC"} & heights.keys():
        return Missing(title, " ".join(absent))
    figure = new_figure(0.6 + sum(heights.values()))
    grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=list(heights.values()))
    axes = dict(zip(heights, grid[:, 0], strict=True))
    said, ends = [], []
    for name, series, color in losses:
        dots = "o" if name == "validation" else None
        line = draw_line(axes["loss"], series.steps, series.values, color=color, marker=dots)
        said.append(f"The {name} loss goes from {told(line[0])} to {told(line[-1])}.")
        ends.append((line[-1], f"{name}\n{told(line[-1])}", color))
    if losses:
        axes["loss"].set_ylabel("loss")
        label_ends(axes["loss"], ends)
    if "RMMC" in axes:
        said.append(_draw_rmmc(axes["RMMC"], rmmc))
    if syncs:
        _draw_syncs(axes["syncs"], syncs, run.steps)
        said.append(f"Green marks {counted(syncs, 'sync step')}{', darker where more' if len(syncs) > MANY else ''}.")
    if any(len(series) > MANY for series in [rmmc, *(series for _, series, _ in losses)]):
        said.append("Strong lines are running means, faint ones what was logged.")
    over_steps(grid[-1, 0], run.steps)
    shown = listed([*(f"{name} loss" for name, _, _ in losses), *(["RMMC"] if "RMMC" in axes else [])])
    alt = f"Lines of {shown} over {run.steps} optimizer steps{', and a mark at each sync step' if syncs else ''}."
    return Drawing("training", title, as_png(figure), alt, " ".join([*said, *absent]))


def _draw_rmmc(axes: "Axes", rmmc: Series) -> str:
    draw_line(axes, rmmc.steps, rmmc.values, color=RMMC)
    axes.set_ylabel("largest RMMC")
    if max(rmmc.values) >= 10 * min(rmmc.values) > 0:
        axes.set_yscale("log")
        log_ticks(axes.yaxis, rmmc.values)
    else:
        axes.set_ylim(bottom=0)
    middle, most = told(statistics.median(rmmc.values)), told(max(rmmc.values))
    where = where_largest(rmmc)
    return (
        f"RMMC of all layers and replicas is {middle} in the median; its largest logged value is {most} (step {where})."
    )


def _draw_syncs(axes: "Axes", syncs: list[int], steps: int) -> None:
    """One mark a sync step or, of many, how many there are in each part of the run as a shade."""
    from matplotlib.colors import LinearSegmentedColormap

    if len(syncs) > MANY:
        shade = LinearSegmentedColormap.from_list("syncs", ["#FFFFFF", SENT])
        axes.hist2d(syncs, [0.5] * len(syncs), bins=[100, 1], range=[[0, steps], [0, 1]], cmap=shade, vmin=0)
    else:
        axes.vlines(syncs, 0, 1, color=SENT, linewidth=1)
    axes.set_yticks([0.5], ["syncs"], color=SENT)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(0, 1)
    axes.grid(False)


def _lacking_losses(run: Run) -> list[str]:
    """A sentence for each loss that makes no line, or one with gaps."""
    sentences = []
    for name, series, option in (("training", run.loss, "--loss"), ("validation", run.val_loss, "--val-loss")):
        finite = series.finite()
        if not series:
            sentences.append(f"No {name} loss was logged under a usual name; {option} KEY takes one of {run.own_keys}.")
        elif len(finite) < 2:
            value = f"one finite value, {told(finite.last)} at step {finite.steps[-1]}" if finite else "no finite value"
            sentences.append(f"The {name} loss has {value}: no line.")
        elif len(finite) < len(series):
            bad = [step for step, value in zip(series.steps, series.values, strict=True) if not math.isfinite(value)]
            sentences.append(f"The {name} loss is not finite in {counted(bad, 'row')}, first at step {bad[0]}.")
    return sentences


def _lacking_rmmc(run: Run) -> list[str]:
    rmmc = run.named("rmmc")
    sentences = ["Under DDP every step synchronises."] if run.is_ddp else []
    if run.monitored and not rmmc:
        sentences.append("No RMMC was logged: only CurvaDion measures it.")
    elif run.monitored and len(rmmc.finite()) < 2:
        sentences.append(
            f"RMMC, logged {counted(rmmc, 'time')} and finite {counted(rmmc.finite(), 'time')}, is no line."
        )
    return sentences


def _bytes(run: Run) -> Drawing | Missing:
    title = "Bytes sent"
    sent, ddp = run.named("bytes_sent").finite(), run.ddp_bytes.finite()
    if run.is_ddp:
        return Missing(title, f"The run is DDP's own: it sent {bytes_told(sent.last)} in {run.steps} steps.")
    if len(sent) < 2 or len(ddp) < 2 or ddp.last <= 0:
        reason = "It takes two logged rows of the bytes sent and saved; a smaller log_every_n_steps gives more."
        return Missing(title, reason)
    figure = new_figure(3.0)
    axes = figure.subplots()
    scale, unit = unit_of(ddp.last)
    ends = []
    for series, color, name in ((sent, SENT, "this run"), (ddp, DDP, "DDP")):
        axes.plot(series.steps, [value / scale for value in series.values], color=color)
        ends.append((series.last / scale, f"{name}\n{bytes_told(series.last)}", color))
    axes.set_ylabel(f"sent so far per replica, {unit}")
    over_steps(axes, run.steps)
    if ddp.last >= 5 * sent.last > 0:
        axes.set_yscale("log")
        log_ticks(axes.yaxis, [value / scale for value in (*sent.values, *ddp.values) if value > 0])
    else:
        axes.set_ylim(bottom=0)
    label_ends(axes, ends)
    share = f"{told(100 * sent.last / ddp.last)} % of the {bytes_told(ddp.last)} that DDP would have sent"
    caption = f"Up to step {sent.steps[-1]} this replica sent {bytes_told(sent.last)}, {share}."
    alt = f"Two rising lines over the steps: the bytes this run sent, and those DDP would have sent. {caption}"
    return Drawing("bytes", title, as_png(figure), alt, caption)


def _gaps(run: Run) -> Drawing | Missing:
    title = "Gaps between sync steps"
    gaps = run.gaps
    if run.is_ddp:
        return Missing(title, "Under DDP every step synchronises.")
    if not gaps:
        return Missing(title, f"It takes two sync steps, and {len(run.sync_steps) or 'none'} logged its own row.")
    figure = new_figure(2.8)
    over, counts = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1])
    draw_dots(over, gaps, SENT)
    over.set_ylabel("steps since the sync before")
    over_steps(over, run.steps)
    longest = max(gaps.values)
    width = max(1, math.ceil(longest / 25))
    edges = [0.5 + width * number for number in range(math.ceil(longest / width) + 1)]
    counts.hist(gaps.values, bins=edges, orientation="horizontal", color=SENT, rwidth=0.85)
    counts.set_xlabel("how often")
    over.set_ylim(0, edges[-1] + 0.02 * longest)
    whole_ticks(over.yaxis)
    whole_ticks(counts.xaxis, 2)
    caption = f"{counted(gaps, 'gap')} with a median of {told(statistics.median(gaps.values))} steps; the longest,"
    caption += f" {told(longest)} steps, ends at step {where_largest(gaps)}."
    halves: list[list[float]] = [[], []]
    for step, gap in zip(gaps.steps, gaps.values, strict=True):
        halves[2 * step >= run.steps].append(gap)
    if all(halves):
        first, second = (told(statistics.fmean(half)) for half in halves)
        caption += f" The mean is {first} in the first half of the run and {second} in the second."
    alt = f"A dot for each sync step, its height the steps since the one before; beside it a histogram. {caption}"
    return Drawing("gaps", title, as_png(figure), alt, caption)


def _layers(run: Run) -> Drawing | Missing:
    from matplotlib.colors import LogNorm

    title = "RMMC by layer"
    layers = {name: series.finite() for name, series in run.layers.items() if series.finite()}
    steps = sorted({step for series in layers.values() for step in series.steps})
    positive = [value for series in layers.values() for value in series.values if value > 0]
    if not run.layers:
        return Missing(title, "No RMMC was logged: only CurvaDion measures it.")
    if len(steps) < 2 or not positive:
        have = "one step" if len(steps) == 1 else "no step"
        return Missing(title, f"It was logged at {have} with a finite value above zero, and a map needs two.")
    rows = [dict(zip(series.steps, series.values, strict=True)) for series in layers.values()]
    low, high = min(positive), max(positive)
    cells = [[max(row[step], low) if step in row else math.nan for step in steps] for row in rows]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(steps)]
    edges = [2 * steps[0] - middles[0], *middles, 2 * steps[-1] - middles[-1]]
    figure = new_figure(min(9.0, 1.3 + 0.24 * len(layers)))
    axes = figure.subplots()
    norm = LogNorm(low, max(high, 1.01 * low))
    image = axes.pcolormesh(edges, range(len(layers) + 1), cells, norm=norm, cmap="viridis")
    every = math.ceil(len(layers) / 32)
    axes.set_yticks([row + 0.5 for row in range(0, len(layers), every)], shortened(list(layers))[::every])
    axes.invert_yaxis()
    axes.grid(False)
    over_steps(axes, run.steps)
    axes.set_xlim(edges[0], edges[-1])
    bar = figure.colorbar(image, label="RMMC", pad=0.02)
    log_ticks(bar.ax.yaxis, positive)
    medians = {name: statistics.median(series.values) for name, series in layers.items()}
    most, least = max(medians, key=medians.__getitem__), min(medians, key=medians.__getitem__)
    caption = f"{counted(layers, 'layer')} at {len(steps)} logged steps on this replica; brighter is more change."
    caption += f" In the median over the run {most} changes most ({told(medians[most])})"
    caption += f" and {least} least ({told(medians[least])})." if most != least else "."
    alt = f"Heat map of RMMC, the layers one below another and the steps from left to right. {caption}"
    return Drawing("layers", title, as_png(figure), alt, caption)


def _drift(run: Run) -> Drawing | Missing:
    title = "Drift at each sync"
    drift = run.named("drift").finite()
    if run.is_ddp:
        return Missing(title, "DDP's replicas never drift apart.")
    if not drift:
        return Missing(title, "No sync step logged its drift.")
    syncs = set(run.sync_steps)
    pairs = [(step, 100 * value) for step, value in zip(drift.steps, drift.values, strict=True)]
    within, between = ([pair for pair in pairs if (pair[0] in syncs) == inside] for inside in (True, False))
    figure = new_figure(2.8)
    axes = figure.subplots()
    for group, look in ((within, {}), (between, {"markerfacecolor": "white", "markeredgewidth": 1.2})):
        draw_dots(axes, Series([step for step, _ in group], [value for _, value in group]), DRIFT, **look)
    axes.set(ylabel="distance to the consensus,\n% of its norm", ylim=(0, None))
    over_steps(axes, run.steps)
    caption = f"Just before it met the others this replica was {told(statistics.median(v for _, v in pairs))} % of the"
    caption += f" consensus's norm away from it in the median, and {told(max(v for _, v in pairs))} % at most"
    caption += f" (step {where_largest(drift)}). Filled: {counted(within, 'sync step')}."
    if between:
        caption += f" Open: {counted(between, 'meeting')} between steps, such as those before a validation."
    alt = f"A dot for each meeting of the replicas, its height the distance of this replica to the consensus. {caption}"
    return Drawing("drift", title, as_png(figure), alt, caption)
