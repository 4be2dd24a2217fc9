"""Reads the logs of CSVLogger and TensorBoardLogger."""

import csv
import math
import re
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from ..errors import ReportError
from .logged_run import LoggedRun, Series

CSV_FILE = "metrics.csv"
EVENT_FILES = "events.out.tfevents.*"


def read_run(folder: Path, name: str = "", loss_key: str | None = None, val_key: str | None = None) -> LoggedRun:
    """Read the logs in a folder or, if it has none, the newest logs below it.

    Args:
        folder: Such as the ``save_dir`` of a logger, or its ``lightning_logs/version_0``.
        name: Name of the run; by default the folder's.
        loss_key: See :class:`LoggedRun`.
        val_key: See :class:`LoggedRun`.

    Raises:
        ReportError: No such folder, no log in it, an empty log, or tensorboard is needed and not installed.

    Example::

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "metrics.csv").write_text("loss,step\\n2.5,9\\n,12\\n2.0,19\\n")
        ...     read_run(Path(folder), "mine").loss
        Series(steps=[9, 19], values=[2.5, 2.0])
    """
    if not folder.is_dir():
        raise ReportError(f"{folder} is no directory; give the directory that a logger wrote to")
    candidates = _find_log_folders(folder)
    if not candidates:
        raise ReportError(
            f"{folder} has no {CSV_FILE} and no TensorBoard event file, nor has any directory below it; give the"
            " directory that CSVLogger or TensorBoardLogger wrote to, such as lightning_logs/version_0"
        )
    source = candidates[-1]
    note = ""
    if len(candidates) > 1:
        note = f"This is the newest of the {len(candidates)} runs below {folder}: {source.relative_to(folder)}."
    series = read_csv(source / CSV_FILE) if (source / CSV_FILE).is_file() else read_tensorboard(source)
    if not series:
        raise ReportError(f"the logs in {source} hold no value yet; was the run longer than log_every_n_steps?")
    return LoggedRun(name or folder.resolve().name, source, series, note, loss_key, val_key, _last_written(source))


def _last_written(folder: Path) -> str:
    logs = [*folder.glob(CSV_FILE), *folder.glob(EVENT_FILES)]
    return f"{datetime.fromtimestamp(max(path.stat().st_mtime for path in logs)):%Y-%m-%d %H:%M}"


def _find_log_folders(folder: Path) -> list[Path]:
    """Folders with logs, the newest last: by version number if all are versions of one logger, else by time."""
    modified: dict[Path, float] = {}
    for pattern in (CSV_FILE, EVENT_FILES):
        for path in folder.rglob(pattern):
            modified[path.parent] = max(modified.get(path.parent, 0.0), path.stat().st_mtime)
    # A logger's folder may contain folders of its own, such as those of TensorBoard's add_scalars.
    outermost = [path for path in modified if not any(parent in modified for parent in path.parents)]
    versions = {path: re.fullmatch(r"version_(\d+)", path.name) for path in outermost}
    if all(versions.values()) and len({path.parent for path in outermost}) == 1:
        return sorted(outermost, key=lambda path: int(path.name.rpartition("_")[2]))
    return sorted(outermost, key=lambda path: (modified[path], str(path)))


def _to_series(points: Iterable[tuple[str, int, float]]) -> dict[str, Series]:
    """Series from (key, step, value). If a step was logged twice, as after a restart, the later value counts."""
    by_key: dict[str, dict[int, float]] = {}
    for key, step, value in points:
        by_key.setdefault(key, {})[step] = value
    ordered = {key: sorted(values.items()) for key, values in by_key.items()}
    return {key: Series([s for s, _ in values], [v for _, v in values]) for key, values in ordered.items()}


def read_csv(path: Path) -> dict[str, Series]:
    """Series by key from CSVLogger's file. Rows may come in any order; cells that are no numbers are skipped.

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
                step = _parse_float(row.pop("step", None))
                for key, cell in row.items():
                    value = _parse_float(cell)
                    # A key of None holds the cells beyond the header.
                    if step is not None and math.isfinite(step) and key and value is not None:
                        yield key, int(step), value

    return _to_series(points())


def _parse_float(cell: object) -> float | None:
    try:
        return float(cell) if isinstance(cell, str) and cell else None
    except ValueError:
        return None


def read_tensorboard(folder: Path) -> dict[str, Series]:
    """Series by tag from the scalars in a folder's TensorBoard event files, in float32 precision.

    Raises:
        ReportError: tensorboard is not installed.

    Example::

        >>> import tempfile
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with SummaryWriter(folder) as writer:
        ...         writer.add_scalar("loss", 2.5, 9)
        ...     read_tensorboard(Path(folder))
        {'loss': Series(steps=[9], values=[2.5])}
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ModuleNotFoundError as error:
        raise ReportError(
            f'{folder} holds TensorBoard event files, which need tensorboard: pip install "lightning-curvadion[report]"'
        ) from error
    # A size of 0 keeps all points instead of a sample. Rows out of order are no restart here, so nothing is purged.
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    events.Reload()
    tags = events.Tags()["scalars"]
    return _to_series((tag, event.step, event.value) for tag in tags for event in events.Scalars(tag))
