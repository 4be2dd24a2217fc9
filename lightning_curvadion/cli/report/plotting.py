"""Matplotlib helpers of the report: colours, style, lines and points, labels and axes."""

import io
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import ReportError
from .logged_run import Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# One colour per quantity in every figure, by its place in the palettes below.
LOSS_COLOR, VAL_LOSS_COLOR, RMMC_COLOR, SENT_COLOR, DRIFT_COLOR, DDP_COLOR = (f"C{number}" for number in range(6))
MEMBERS_COLOR, JOINED_COLOR, LOST_COLOR = (f"C{number}" for number in (8, 6, 7))
RUN_COLORS = (LOSS_COLOR, VAL_LOSS_COLOR, "C6", "C7", DRIFT_COLOR, "C8", RMMC_COLOR)
# From Okabe and Ito's palette for the colour-blind, some darkened, or lightened for a dark page.
_LIGHT = ("#0072B2", "#D55E00", "#882255", "#00825F", "#9A6A00", "#6E6E6E", "#009E73", "#CC79A7", "#56B4E9")
_DARK = ("#56B4E9", "#FF8A3D", "#E08AB4", "#2FC79A", "#E0AE3C", "#A8A8A8", "#7FE0C0", "#F2B5D4", "#9AD4F5")
DDP_LINE_STYLES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
STYLE = {
    # Of a phone's 390 pixels a figure takes 370: its text is then 11 pixels high.
    "font.size": 12,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-4, 7),
    "grid.color": "#E6E6E6",
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
DARK_PAPER, _DARK_INK = "#161616", "#E8E8E8"
DARK_STYLE = {
    "figure.facecolor": DARK_PAPER,
    "axes.facecolor": DARK_PAPER,
    "savefig.facecolor": DARK_PAPER,
    "grid.color": "#333333",
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _DARK_INK),
}
FIGURE_WIDTH, DPI = 5.6, 200
# With more points than this, single points are drawn faintly.
MANY_POINTS = 150


@contextmanager
def plot_style(dark: bool = False) -> Iterator[None]:
    """Matplotlib's default style with ``STYLE`` on top, whatever the user's own style is.

    Args:
        dark: For a dark page.

    Raises:
        ReportError: Matplotlib is not installed.

    Example::

        >>> with plot_style():
        ...     figure = new_figure(2.0)
        >>> figure.get_size_inches().tolist()
        [5.6, 2.0]
    """
    try:
        import matplotlib.style
    except ModuleNotFoundError as error:
        raise ReportError('figures need matplotlib: pip install "lightning-curvadion[report]"') from error
    from cycler import cycler

    palette = {"axes.prop_cycle": cycler(color=_DARK if dark else _LIGHT)}
    with matplotlib.style.context(["default", {**STYLE, **(DARK_STYLE if dark else {}), **palette}]):
        yield


def new_figure(height: float) -> "Figure":
    """An empty figure, as wide as the page and ``height`` inches high. It is not registered with pyplot.

    Example::

        >>> new_figure(2.0).axes
        []
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(FIGURE_WIDTH, height))
    FigureCanvasAgg(figure)
    return figure


def figure_to_png(figure: "Figure") -> bytes:
    r"""A figure as PNG with a palette, a third of the bytes. Equal figures give equal bytes.

    Example::

        >>> figure_to_png(new_figure(0.5))[:4]
        b'\x89PNG'
    """
    # matplotlib needs it too.
    from PIL import Image

    drawn, buffer = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def plot_line(axes: "Axes", x: Sequence[float], y: Sequence[float], **style: Any) -> Sequence[float]:
    """Plot a line; with many points, a faint line and its running mean.

    Returns:
        The values of the strong line: ``y`` or its running mean.

    Example::

        >>> axes = new_figure(2.0).subplots()
        >>> mean = plot_line(axes, range(1000), [step % 3 for step in range(1000)], color=LOSS_COLOR)
        >>> len(axes.lines), round(mean[500], 1)
        (2, 1.0)
    """
    if len(x) > MANY_POINTS:
        axes.plot(x, y, **{**style, "alpha": 0.2, "linewidth": 0.8, "label": None})
        y = running_mean(y)
    axes.plot(x, y, **style)
    return y


def running_mean(values: Sequence[float]) -> list[float]:
    """Centred running mean over a fiftieth of all values; over fewer at both ends.

    Example::

        >>> running_mean([1.0, 2.0, 6.0, 4.0])
        [1.5, 3.0, 4.0, 5.0]
    """
    reach = max(1, len(values) // 100)
    return [statistics.fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def plot_points(axes: "Axes", series: Series, color: str, **style: Any) -> None:
    """Plot a point for each value.

    Example::

        >>> axes = new_figure(2.0).subplots()
        >>> plot_points(axes, Series([1, 4], [1.0, 3.0]), SENT_COLOR)
        >>> axes.lines[0].get_linestyle()
        'None'
    """
    alpha = 0.8 if len(series) <= MANY_POINTS else 0.3
    defaults: dict[str, Any] = {"markersize": 4, "markeredgewidth": 0, "alpha": alpha}
    axes.plot(series.steps, series.values, "o", color=color, **{**defaults, **style})


def label_line_ends(axes: "Axes", labels: Iterable[tuple[float, str, str]]) -> None:
    """Write labels to the right of the line ends. Call it when the scale of the axis is set.

    Args:
        axes: With the lines.
        labels: (y of the line's end, text, color). Labels that would overlap are moved apart.

    Example::

        >>> axes = new_figure(2.0).subplots()
        >>> label_line_ends(axes, [(0.5, "one", LOSS_COLOR), (0.5, "other", DDP_COLOR)])
        >>> low, high = sorted(text.get_position()[1] for text in axes.texts)
        >>> f"{high - low:.2f}"
        '0.27'
    """
    # Two lines of text as a share of the axes' height, estimated: the layout is computed only when the figure is saved.
    figure = axes.get_figure(root=True)
    assert figure is not None
    spacing = 0.42 / (axes.get_position().height * figure.get_figheight())
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    y = -math.inf
    for value, text, color in sorted(labels):
        y = max(to_axes.transform((0, value))[1], y + spacing)
        axes.text(1.02, y, text, transform=axes.transAxes, color=color, va="center", fontsize=11)


def set_log_ticks(axis: "Axis", values: Sequence[float]) -> None:
    """Plain decimal ticks on a logarithmic axis that shows these values.

    Example::

        >>> axes = new_figure(2.0).subplots()
        >>> axes.set_yscale("log")
        >>> set_log_ticks(axes.yaxis, [0.01, 2])
        >>> axes.yaxis.get_major_formatter().format_ticks([0.01, 0.02, 0.05])
        ['0.01', '0.02', '0.05']
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    wide = max(values) > 300 * min(values)
    axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def set_integer_ticks(axis: "Axis", max_ticks: int = 5) -> None:
    """A few ticks at integers only.

    Example::

        >>> axes = new_figure(2.0).subplots()
        >>> set_integer_ticks(axes.yaxis)
        >>> axes.get_yticks().tolist()
        [0.0, 1.0]
    """
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=max_ticks, integer=True))


def set_step_axis(axes: "Axes", num_steps: int) -> None:
    """Label and limit the x axis for a run of ``num_steps`` optimizer steps.

    Example::

        >>> axes = new_figure(2.0).subplots()
        >>> set_step_axis(axes, 600)
        >>> axes.get_xlabel()
        'optimizer step'
    """
    axes.set(xlabel="optimizer step", xlim=(-0.01 * num_steps, num_steps))
    set_integer_ticks(axes.xaxis, 6)
