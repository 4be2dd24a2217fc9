"""Writes the report: one page with figures of what runs logged."""

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import ReportError
from .comparison import plot_comparison
from .figures import MissingFigure, ReportFigure, plot_run
from .html_page import figure_html, heading_html, page_html, settings_html, table_html
from .log_readers import read_run
from .membership_figure import plot_membership


def build_report(
    runs: Sequence[Path | str], output: Path | str, loss: str | None = None, val_loss: str | None = None
) -> Path:
    """Write ``report.html`` and its figures into a folder.

    Args:
        runs: A directory for each run, with its logs or with versions of them below it; the newest version counts.
            With several runs the page also compares their losses.
        output: The folder; created if missing.
        loss: Key of the training loss; ``None`` takes the usual names.
        val_loss: Key of the validation loss, likewise.

    Returns:
        The path of the page.

    Raises:
        ReportError: A directory has no logs, no run logged the given key, or a library is not installed.

    Example::

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "metrics.csv").write_text("loss,step\\n2.5,9\\n2.25,19\\n")
        ...     page = build_report([folder], Path(folder) / "report")
        ...     page.name, "The training loss goes from 2.5000 to 2.2500." in page.read_text()
        ('report.html', True)
    """
    folders, output = [Path(run) for run in runs], Path(output)
    logged = [read_run(path, name, loss, val_loss) for path, name in zip(folders, _run_names(folders), strict=True)]
    for key in (loss, val_loss):
        if key and not any(key in run.series for run in logged):
            raise ReportError(f"no run logged {key!r}; {logged[0].name} logged {logged[0].own_keys}")
    output.mkdir(parents=True, exist_ok=True)
    sections = []
    if len(logged) > 1:
        comparison = plot_comparison(logged)
        _write_images(comparison, "", output)
        sections += ["<h2>All runs</h2>", table_html(logged), *map(figure_html, comparison)]
    for run, file_name in zip(logged, _file_names([run.name for run in logged]), strict=True):
        figures = [*plot_run(run), *plot_membership(run)]
        _write_images(figures, f"{file_name}-", output)
        sections += [heading_html(run), table_html([run]), settings_html(run), *map(figure_html, figures)]
    title = f"{logged[0].name}: training and communication" if len(logged) == 1 else "Comparison of runs"
    return _write_file(output / "report.html", page_html(title, sections).encode())


def _run_names(folders: Sequence[Path]) -> list[str]:
    """Short unique names: the last part of each path if they differ, else the shortest part that does."""
    paths = [path.resolve() for path in folders]
    if len(set(paths)) < len(paths):
        raise ReportError("a directory is given twice; name each run once")
    if len({path.name for path in paths}) == len(paths):
        return [path.name for path in paths]
    parts = [path.parts for path in paths]
    while len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    common = os.path.commonpath(["/".join(part) for part in parts])
    return [Path(*part).relative_to(common).as_posix() for part in parts]


def _write_images(figures: Sequence[ReportFigure | MissingFigure], prefix: str, output: Path) -> None:
    for figure in figures:
        if isinstance(figure, ReportFigure):
            _write_file(output / f"{prefix}{figure.name}.png", figure.png)
            _write_file(output / f"{prefix}{figure.name}-dark.png", figure.dark_png)


def _file_names(run_names: Sequence[str]) -> list[str]:
    """A file name for each run, with a number where runs differ only in characters that file names cannot have."""
    file_names: list[str] = []
    for name in run_names:
        stem = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"
        candidates = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        # Some file systems take a capital for a small letter.
        taken = {file_name.lower() for file_name in file_names}
        file_names.append(next(candidate for candidate in candidates if candidate.lower() not in taken))
    return file_names


def _write_file(path: Path, data: bytes) -> Path:
    """Write a file under another name and rename it, so that nobody finds half of it."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
