"""What a run logged, read back from CSVLogger's or TensorBoard's files into one plain structure."""

import bisect
import csv
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

CSV_FILE = "metrics.csv"
EVENT_FILES = "events.out.tfevents.*"
LAYER = "curvadion/rmmc_layer/"

_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation")}
# What Lightning appends to a key; a training loss is told best by step, a validation loss by pass.
_SUFFIXES = {"train": ("", "_step", "_epoch"), "val": ("", "_epoch", "/dataloader_idx_0", "_step")}


class ReportError(Exception):
    """Something the user can put right; the message says how."""


@dataclass(frozen=True)
class Series:
    """One logged quantity: its values and the optimizer steps they belong to, in the order of the steps.

    Example::

        >>> series = Series([0, 10, 20], [float("inf"), 4.0, 2.0])
        >>> series.finite().steps, series.at(15), series.last
        ([10, 20], 3.0, 2.0)
    """

    steps: list[int]
    values: list[float]

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def last(self) -> float:
        """The value of the last step."""
        return self.values[-1]

    def finite(self) -> "Series":
        """The same without infinite values and NaN."""
        kept = [(s, v) for s, v in zip(self.steps, self.values, strict=True) if math.isfinite(v)]
        return Series([s for s, _ in kept], [v for _, v in kept])

    def at(self, step: int) -> float:
        """The value at a step: on a straight line between logged ones, the nearest one outside of them."""
        after = bisect.bisect_left(self.steps, step)
        if after == 0 or after == len(self.steps):
            return self.values[min(after, len(self.steps) - 1)]
        (a, x), (b, y) = ((self.steps[i], self.values[i]) for i in (after - 1, after))
        return x + (y - x) * (step - a) / (b - a)


EMPTY = Series([], [])


@dataclass(frozen=True)
class Run:
    """All that one run logged.

    Args:
        name: What the report calls it.
        source: The folder that holds its logs.
        series: Every logged quantity by its key.
        note: Why this folder was taken, where there was a choice; else empty.
        loss_key: Key of the training loss; ``None`` takes the first of the usual names that was logged.
        val_key: Key of the validation loss, likewise.

    Example::

        >>> series = {"train_loss_step": Series([4, 9], [2.5, 2.0]), "val_loss": Series([9], [2.1])}
        >>> run = Run("mine", Path("logs"), series)
        >>> run.loss.last, run.val_loss.last, run.steps, run.monitored
        (2.0, 2.1, 10, False)
    """

    name: str
    source: Path
    series: dict[str, Series]
    note: str = ""
    loss_key: str | None = None
    val_key: str | None = None

    def named(self, name: str) -> Series:
        """What CommunicationMonitor logged under a name; empty if it did not."""
        return self.series.get(f"curvadion/{name}", EMPTY)

    @property
    def steps(self) -> int:
        """Optimizer steps, up to the last one of which anything was logged."""
        return max((series.steps[-1] for series in self.series.values()), default=-1) + 1

    @property
    def loss(self) -> Series:
        """The training loss."""
        return self.series.get(self.loss_key or self._usual("train") or "", EMPTY)

    @property
    def val_loss(self) -> Series:
        """The validation loss."""
        return self.series.get(self.val_key or self._usual("val") or "", EMPTY)

    def _usual(self, split: str) -> str | None:
        words = _SPLITS[split]
        stems = [f"{word}{sign}loss" for word in words for sign in "_/"] + [f"loss/{word}" for word in words]
        stems += ["loss"] if split == "train" else []
        keys = (stem + suffix for stem in stems for suffix in _SUFFIXES[split])
        return next((key for key in keys if key in self.series), None)

    @property
    def monitored(self) -> bool:
        """Whether CommunicationMonitor was there."""
        return len(self.named("bytes_sent")) > 0

    @property
    def ddp_bytes(self) -> Series:
        """What DDP would have sent so far, in bytes: what was sent and what was saved."""
        sent, saved = self.named("bytes_sent"), self.named("bytes_saved")
        return (
            Series(sent.steps, [v + saved.at(s) for s, v in zip(sent.steps, sent.values, strict=True)])
            if saved
            else EMPTY
        )

    @property
    def is_ddp(self) -> bool:
        """Whether the replicas communicated through DDP's reducer: at every step, and no step has a sync's own row."""
        rates = self.named("sync_rate").values
        return (
            bool(rates)
            and all(rate == 1 for rate in rates)
            and not self.sync_steps
            and not any(self.named("bytes_saved").values)
        )

    @property
    def sync_steps(self) -> list[int]:
        """The steps that synchronised, as far as each logged its own row."""
        return self.named("local_steps").steps

    @property
    def own_keys(self) -> str:
        """Keys of what the run logged by itself, the first ten."""
        keys = sorted(key for key in self.series if not key.startswith("curvadion/") and key != "epoch")
        return ", ".join(keys[:10] + ["..."] * (len(keys) > 10)) or "nothing"

    @property
    def gaps(self) -> Series:
        """Optimizer steps from one sync step to the next, at each sync step after the first."""
        local = self.named("local_steps")
        return Series(local.steps[1:], [value + 1 for value in local.values[1:]])

    @property
    def layers(self) -> dict[str, Series]:
        """RMMC by layer, numbered ones in the order of their numbers."""
        found = {key[len(LAYER) :]: series for key, series in self.series.items() if key.startswith(LAYER)}
        return {name: found[name] for name in sorted(found, key=_natural)}


def _natural(name: str) -> list[tuple[bool, int, str]]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]


def read_run(folder: Path, name: str = "", loss_key: str | None = None, val_key: str | None = None) -> Run:
    """Read the logs in a folder or, where there are none, the newest ones below it.

    Args:
        folder: Such as the ``save_dir`` of a logger, or its ``lightning_logs/version_0``.
        name: What to call the run; by default as the folder is called.
        loss_key: See :class:`Run`.
        val_key: See :class:`Run`.

    Raises:
        ReportError: If there is no such folder, no log in it, nothing in the log, or no tensorboard to read it with.

    Example::

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "metrics.csv").write_text("loss,step\\n2.5,9\\n,12\\n2.0,19\\n")
        ...     read_run(Path(folder), "mine").loss
        Series(steps=[9, 19], values=[2.5, 2.0])
    """
    if not folder.is_dir():
        raise ReportError(f"{folder} is no directory; give the directory that a logger wrote to")
    found = _log_folders(folder)
    if not found:
        raise ReportError(
            f"{folder} has no {CSV_FILE} and no TensorBoard event file, nor has any directory below it; give the"
            " directory that CSVLogger or TensorBoardLogger wrote to, such as lightning_logs/version_0"
        )
    source = found[-1]
    note = ""
    if len(found) > 1:
        note = f"Of the {len(found)} runs that lie below {folder} this is the newest, {source.relative_to(folder)}."
    series = read_csv(source / CSV_FILE) if (source / CSV_FILE).is_file() else read_events(source)
    if not series:
        raise ReportError(f"the logs in {source} hold no value yet; was the run longer than log_every_n_steps?")
    return Run(name or folder.resolve().name, source, series, note, loss_key, val_key)


def _log_folders(folder: Path) -> list[Path]:
    """Folders that hold logs, the newest last: by version where they are versions of one thing, else as written."""
    written: dict[Path, float] = {}
    for pattern in (CSV_FILE, EVENT_FILES):
        for path in folder.rglob(pattern):
            written[path.parent] = max(written.get(path.parent, 0.0), path.stat().st_mtime)
    # A logger's folder may have folders of its own, such as those of TensorBoard's add_scalars.
    outermost = [path for path in written if not any(parent in written for parent in path.parents)]
    versions = {path: re.fullmatch(r"version_(\d+)", path.name) for path in outermost}
    if all(versions.values()) and len({path.parent for path in outermost}) == 1:
        return sorted(outermost, key=lambda path: int(path.name.rpartition("_")[2]))
    return sorted(outermost, key=lambda path: (written[path], str(path)))


def _collect(points: Iterable[tuple[str, int, float]]) -> dict[str, Series]:
    """Series from (key, step, value); of one step logged twice the later value counts, as after a restart."""
    found: dict[str, dict[int, float]] = {}
    for key, step, value in points:
        found.setdefault(key, {})[step] = value
    ordered = {key: sorted(values.items()) for key, values in found.items()}
    return {key: Series([s for s, _ in values], [v for _, v in values]) for key, values in ordered.items()}


def read_csv(path: Path) -> dict[str, Series]:
    """What CSVLogger wrote, by key, whatever the order of the rows; cells that are no numbers are left out.

    Example::

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "metrics.csv"
        ...     _ = path.write_text("a,b,step\\n1,,9\\n,inf,3\\n2,x,0\\n3")
        ...     read_csv(path)
        {'a': Series(steps=[0, 9], values=[2.0, 1.0]), 'b': Series(steps=[3], values=[inf])}
    """

    def points() -> Iterable[tuple[str, int, float]]:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            for row in csv.DictReader(file):
                step = _number(row.pop("step", None))
                for key, cell in row.items():
                    value = _number(cell)
                    # A key of None holds the cells beyond the header.
                    if step is not None and math.isfinite(step) and key and value is not None:
                        yield key, int(step), value

    return _collect(points())


def _number(cell: object) -> float | None:
    try:
        return float(cell) if isinstance(cell, str) and cell else None
    except ValueError:
        return None


def read_events(folder: Path) -> dict[str, Series]:
    """The scalars in a folder's TensorBoard event files, by tag; they have the precision of float32.

    Raises:
        ReportError: If tensorboard is not installed.

    Example::

        >>> import tempfile
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with SummaryWriter(folder) as writer:
        ...         writer.add_scalar("loss", 2.5, 9)
        ...     read_events(Path(folder))
        {'loss': Series(steps=[9], values=[2.5])}
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ModuleNotFoundError as error:
        raise ReportError(
            f'{folder} holds TensorBoard event files, which need tensorboard: pip install "lightning-curvadion[report]"'
        ) from error
    # All points, not a sample of them; and rows that come later than rows of later steps are no sign of a restart.
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    events.Reload()
    tags = events.Tags()["scalars"]
    return _collect((tag, event.step, event.value) for tag in tags for event in events.Scalars(tag))
