"""Pictures of the comparison: loss against bytes, and against seconds, of the methods in the README's table."""

from pathlib import Path

from examples.benchmarks.compare_plan import RATES, STEPS, read
from examples.benchmarks.compare_report import CHOICES, pace, points, rows_at
from examples.benchmarks.methods import DEFAULT, HALF_RANK

# Told apart by the colour-blind as well (Okabe and Ito, 2008).
_COLORS = dict(zip(CHOICES, ("#0072b2", "#009e73", "#56b4e9", "#e69f00", "#cc79a7", "#d55e00", "#000000"), strict=True))
# Where a name stands that other curves leave no room for at the right of its curve's end: a point, the distance to it
# and the corner there.
_PLACES = {
    DEFAULT: (-1, (0, -6), "right", "top"),
    "DiLoCo, Muon, H=30": (-1, (4, -2), "left", "top"),
    HALF_RANK: (0, (0, 6), "left", "bottom"),
}
_LINK = RATES[-1].replace("mbit", " Mbit/s")


def plots(results: Path, folder: Path, steps: int = STEPS) -> None:
    """Draw a run of each method, one seed, and name it at its end.

    Args:
        results: CSV of the runs.
        folder: Where ``loss_against_bytes.png`` and ``loss_against_seconds.png`` are written.
        steps: Of the runs.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read(results)
    for name, label in (("bytes", "MB that a replica sent"), ("seconds", f"seconds on a link of {_LINK}")):
        figure, axes = pyplot.subplots(figsize=(9, 5.5))
        for method, color in _COLORS.items():
            mine, speed = rows_at(rows, method=method, steps=steps)[:1], pace(rows, method, RATES[-1])
            if not mine or (name == "seconds" and speed is None):
                continue
            curve = points(mine[0])
            x = [sent / 1e6 if name == "bytes" else step / (speed or 1) for step, _, sent, _, _ in curve]
            y = [loss for _, loss, _, _, _ in curve]
            axes.plot(x, y, color=color, linewidth=3.5 if method == DEFAULT else 1.8)
            point, offset, horizontal, vertical = _PLACES.get(method, (-1, (6, 0), "left", "bottom"))
            axes.annotate(
                CHOICES[method].replace(", ", ",\n"),
                (x[point], y[point]),
                xytext=offset,
                textcoords="offset points",
                horizontalalignment=horizontal,
                verticalalignment=vertical,
                color=color,
                fontsize=12,
                fontweight="bold" if method == DEFAULT else "normal",
            )
        axes.set_xlabel(label, fontsize=12)
        axes.set_ylabel("validation loss, nats a byte", fontsize=12)
        axes.set_xscale("log")
        # Room for the names.
        axes.set_xlim(right=3.5 * axes.get_xlim()[1])
        axes.set_ylim(bottom=axes.get_ylim()[0] - 0.08)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        figure.savefig(folder / f"loss_against_{name}.png", dpi=120, bbox_inches="tight")
        pyplot.close(figure)
