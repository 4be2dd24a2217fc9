"""How a report's figures are drawn: colours, style, lines with their names, axes, and numbers in words."""

import io
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .log_readers import ReportError, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's colours, some darkened, which the colour-blind tell apart; one for each thing, in every figure.
LOSS, VAL_LOSS, RMMC, SENT, DRIFT, DDP = "#0072B2", "#D55E00", "#882255", "#00825F", "#9A6A00", "#6E6E6E"
RUNS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#9A6A00", "#56B4E9", "#882255")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
STYLE = {
    "font.size": 10,
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
WIDTH, DPI = 6.4, 200
MANY = 150  # where there are more points than this, each is drawn faintly


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's default style with ours on top, whatever the user's own is; the user's is back afterwards.

    Raises:
        ReportError: If matplotlib is not installed.

    Example::

        >>> with style():
        ...     figure = new_figure(2.0)
        >>> figure.get_size_inches().tolist()
        [6.4, 2.0]
    """
    try:
        import matplotlib.style
    except ModuleNotFoundError as error:
        raise ReportError('figures need matplotlib: pip install "lightning-curvadion[report]"') from error
    with matplotlib.style.context(["default", STYLE]):
        yield


def new_figure(height: float) -> "Figure":
    """An empty figure as wide as the page and ``height`` inches high, known to no window and to no pyplot.

    Example::

        >>> new_figure(2.0).axes
        []
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height))
    FigureCanvasAgg(figure)
    return figure


def as_png(figure: "Figure") -> bytes:
    r"""The picture of a figure; of equal figures it is equal.

    Example::

        >>> as_png(new_figure(0.5))[:4]
        b'\x89PNG'
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def draw_line(axes: "Axes", x: Sequence[float], y: Sequence[float], **look: Any) -> Sequence[float]:
    """A line; where it has many points they are drawn faintly, and their running mean over them.

    Returns:
        The heights of the line: ``y`` or its running mean.

    Example::

        >>> axes = new_figure(2.0).subplots()
        >>> mean = draw_line(axes, range(1000), [step % 3 for step in range(1000)], color=LOSS)
        >>> len(axes.lines), round(mean[500], 1)
        (2, 1.0)
    """
    if len(x) > MANY:
        axes.plot(x, y, **{**look, "alpha": 0.2, "linewidth": 0.8, "label": None})
        y = running_mean(y)
    axes.plot(x, y, **look)
    return y


def running_mean(values: Sequence[float]) -> list[float]:
    """Of each value and its neighbours, a fiftieth of all of them; fewer at both ends.

    Example::

        >>> running_mean([1.0, 2.0, 6.0, 4.0])
        [1.5, 3.0, 4.0, 5.0]
    """
    reach = max(1, len(values) // 100)
    return [statistics.fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def draw_dots(axes: "Axes", series: Series, color: str, **look: Any) -> None:
    """A dot for each value.

    Example::

        >>> axes = new_figure(2.0).subplots()
        >>> draw_dots(axes, Series([1, 4], [1.0, 3.0]), SENT)
        >>> axes.lines[0].get_linestyle()
        'None'
    """
    usual: dict[str, Any] = {"markersize": 4, "markeredgewidth": 0, "alpha": 0.8 if len(series) <= MANY else 0.3}
    axes.plot(series.steps, series.values, "o", color=color, **{**usual, **look})


def label_ends(axes: "Axes", labels: Iterable[tuple[float, str, str]]) -> None:
    """Write (height, text, color) right of the lines that end at these heights, apart where they would overlap.

    To be called when the axis has its scale.

    Example::

        >>> axes = new_figure(2.0).subplots()
        >>> label_ends(axes, [(0.5, "one", LOSS), (0.5, "other", DDP)])
        >>> low, high = sorted(text.get_position()[1] for text in axes.texts)
        >>> f"{high - low:.2f}"
        '0.23'
    """
    # Two lines of text, in shares of the height; the layout, not yet known, leaves a panel about this much of its own.
    figure = axes.get_figure(root=True)
    assert figure is not None
    apart = 0.36 / (axes.get_position().height * figure.get_figheight())
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    below = -math.inf
    for height, text, color in sorted(labels):
        below = max(to_axes.transform((0, height))[1], below + apart)
        axes.text(1.02, below, text, transform=axes.transAxes, color=color, va="center", fontsize=9)


def log_ticks(axis: "Axis", values: Sequence[float]) -> None:
    """Ticks with plain numbers for a logarithmic axis of these values.

    Example::

        >>> axes = new_figure(2.0).subplots()
        >>> axes.set_yscale("log")
        >>> log_ticks(axes.yaxis, [0.01, 2])
        >>> axes.yaxis.get_major_formatter().format_ticks([0.01, 0.02, 0.05])
        ['0.01', '0.02', '0.05']
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    wide = max(values) > 300 * min(values)
    axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def whole_ticks(axis: "Axis", most: int = 5) -> None:
    """A few ticks, at whole numbers only.

    Example::

        >>> axes = new_figure(2.0).subplots()
        >>> whole_ticks(axes.yaxis)
        >>> axes.get_yticks().tolist()
        [0.0, 1.0]
    """
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=most, integer=True))


def over_steps(axes: "Axes", steps: int) -> None:
    """The horizontal axis of a run of so many optimizer steps.

    Example::

        >>> axes = new_figure(2.0).subplots()
        >>> over_steps(axes, 600)
        >>> axes.get_xlabel()
        'optimizer step'
    """
    axes.set(xlabel="optimizer step", xlim=(-0.01 * steps, steps))
    whole_ticks(axes.xaxis, 6)


def unit_of(size: float) -> tuple[float, str]:
    """The unit in which a number of bytes is told, and its size.

    Example::

        >>> unit_of(5.2e9)
        (1000000000.0, 'GB')
    """
    return next(((s, u) for s, u in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= s), (1.0, "B"))


def bytes_told(size: float) -> str:
    """A number of bytes as people read it, in powers of 1000.

    Example::

        >>> bytes_told(1234), bytes_told(5.2e9), bytes_told(0)
        ('1.23 kB', '5.2 GB', '0 B')
    """
    scale, unit = unit_of(size)
    return f"{told(size / scale)} {unit}"


def told(value: float) -> str:
    """A number with the three digits that count.

    Example::

        >>> told(2.25678), told(1234.5), told(0.00012345), told(float("nan"))
        ('2.26', '1234', '0.000123', 'nan')
    """
    return f"{value:.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def counted(things: Sized, word: str) -> str:
    """How many there are.

    Example::

        >>> counted([1], "gap"), counted([1, 2], "gap")
        ('1 gap', '2 gaps')
    """
    return f"{len(things)} {word}{'s' if len(things) != 1 else ''}"


def listed(words: Sequence[str]) -> str:
    """Words as in a sentence.

    Example::

        >>> listed(["a"]), listed(["a", "b", "c"])
        ('a', 'a, b and c')
    """
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def shortened(names: Sequence[str], length: int = 24) -> list[str]:
    """Dotted names without the words that all of them begin with, and of longer ones the end.

    Example::

        >>> shortened(["model.gpt.blocks.0", "model.gpt.blocks.1"]), shortened(["a-rather-long-name"], 9)
        (['blocks.0', 'blocks.1'], ['…ong-name'])
    """
    parts = [name.split(".") for name in names]
    while all(len(each) > 2 for each in parts) and len({each[0] for each in parts}) == 1:
        parts = [each[1:] for each in parts]
    short = [".".join(each) for each in parts]
    return [name if len(name) <= length else f"…{name[1 - length :]}" for name in short]


def where_largest(series: Series) -> int:
    """The step of the largest value, the first of several.

    Example::

        >>> where_largest(Series([1, 4, 9], [1.0, 3.0, 3.0]))
        4
    """
    return series.steps[series.values.index(max(series.values))]
