"""The figure of an elastic run: its replicas over the steps, and what each loss and join cost."""

from typing import TYPE_CHECKING

from ...trainer.formatting import format_duration, join_words, pluralize
from .figures import MissingFigure, ReportFigure, in_both_styles
from .logged_run import LoggedRun, Series
from .plotting import (
    JOINED_COLOR,
    LOST_COLOR,
    MEMBERS_COLOR,
    figure_to_png,
    new_figure,
    set_integer_ticks,
    set_step_axis,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_membership(run: LoggedRun) -> list[ReportFigure | MissingFigure]:
    """Plot the replicas of a run and what each change cost; nothing of a run whose replicas cannot change.

    Raises:
        ReportError: Matplotlib is not installed.

    Example::

        >>> from pathlib import Path
        >>> series = {"curvadion/members": Series([0, 9], [3.0, 2.0]), "curvadion/replicas_lost": Series([9], [1.0])}
        >>> plot_membership(LoggedRun("mine", Path(), series))[0].caption
        'The run begins with 3 replicas and ends with 2. 1 was lost and 0 joined.'
        >>> plot_membership(LoggedRun("mine", Path(), {}))
        []
    """
    members = run.metric("members")
    return [in_both_styles(lambda: _plot_members(run, members))] if members else []


def _plot_members(run: LoggedRun, members: Series) -> ReportFigure:
    """Panels for the number of replicas and for the seconds of each change, one below the other over the same steps."""
    lost, joined = run.metric("replicas_lost").rises, run.metric("replicas_joined").rises
    seconds, skipped = run.metric("membership_seconds").rises, run.metric("samples_skipped")
    heights = [1.9, 1.3] if seconds else [1.9]
    figure = new_figure(1.0 + sum(heights))
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    _draw_members(panels[0], members, lost, joined, run.num_steps)
    if lost or joined:
        figure.legend(loc="outside upper left", ncols=2, handlelength=1)
    if seconds:
        _draw_seconds(panels[1], seconds, lost)
    set_step_axis(panels[-1], run.num_steps)
    number_lost, number_joined = (round(sum(counts.values)) for counts in (lost, joined))
    caption = f"The run begins with {pluralize(round(members.values[0]), 'replica')} and ends with"
    caption += f" {round(members.last)}. {number_lost} {'was' if number_lost == 1 else 'were'} lost"
    caption += f" and {number_joined} joined."
    if seconds:
        caption += f" This cost the replica that logged it {format_duration(sum(seconds.values))}, the longest"
        caption += f" {format_duration(max(seconds.values))} (step {seconds.step_of_max})."
    if skipped and skipped.last:
        caption += f" Nobody trains on {pluralize(round(skipped.last), 'sample')} that lost replicas had drawn."
    marks = [name for name, counts in (("loss", lost), ("join", joined)) if counts]
    alt = "A line of the number of replicas over the steps"
    alt += f", with a mark at each {join_words(marks)}. {caption}" if marks else f". {caption}"
    return ReportFigure("replicas", "Replicas", figure_to_png(figure), alt, caption)


def _draw_members(axes: "Axes", members: Series, lost: Series, joined: Series, num_steps: int) -> None:
    """Draw the number of replicas as a staircase, losses below it and joins above it."""
    from matplotlib.markers import CARETDOWNBASE, CARETUPBASE

    steps, values = [*members.steps, num_steps], [*members.values, members.last]
    axes.plot(steps, values, drawstyle="steps-post", color=MEMBERS_COLOR)
    for name, counts, color, marker in (
        ("replicas lost", lost, LOST_COLOR, CARETDOWNBASE),
        ("replicas joined", joined, JOINED_COLOR, CARETUPBASE),
    ):
        if counts:
            heights = [members.at(step) for step in counts.steps]
            axes.plot(counts.steps, heights, linestyle="", marker=marker, markersize=8, color=color, label=name)
    axes.set(ylabel="replicas", ylim=(0, max(members.values) + 0.8))
    set_integer_ticks(axes.yaxis)


def _draw_seconds(axes: "Axes", seconds: Series, lost: Series) -> None:
    """Draw a bar for each change."""
    for at_loss, color in ((True, LOST_COLOR), (False, JOINED_COLOR)):
        points = [p for p in zip(seconds.steps, seconds.values, strict=True) if (p[0] in lost.steps) == at_loss]
        axes.vlines([step for step, _ in points], 0, [value for _, value in points], color=color, linewidth=2.5)
    axes.set(ylabel="seconds\nof each", ylim=(0, None))
