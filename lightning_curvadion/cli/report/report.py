"""``python -m lightning_curvadion report RUN_DIR ...``: one page with the figures of what runs have logged."""

import argparse
import base64
import os
import re
import sys
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from .comparison import draw_comparison
from .plotting import bytes_told, told
from .figures import Drawing, Missing, draw_run
from .log_readers import ReportError, Run, read_run

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1b1b1b; --soft: #5c5c5c; --line: #d8d8d8; --paper: #ffffff; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e8e8e8; --soft: #a8a8a8; --line: #3c3c3c; --paper: #161616; }}
}}
body {{ max-width: 45rem; margin: 0 auto; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); overflow-wrap: anywhere; }}
h1 {{ font-size: 1.5rem; }}
h2 {{ font-size: 1.25rem; margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); }}
h3 {{ font-size: 1rem; margin: 2rem 0 0.5rem; }}
p, figcaption {{ margin: 0.5rem 0; }}
.soft {{ color: var(--soft); }}
figure {{ margin: 0; }}
img {{ display: block; width: 100%; height: auto; background: #ffffff; border-radius: 4px; }}
div.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.25rem 1rem 0.25rem 0; border-bottom: 1px solid var(--line); text-align: left;
  overflow-wrap: normal; white-space: nowrap; }}
th {{ font-weight: normal; color: var(--soft); }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def main(args: list[str]) -> int:
    """Write a report as the command line says.

    Args:
        args: What follows ``python -m lightning_curvadion report``.

    Returns:
        The exit status: 0, or 2 if there is nothing to report on or no way to write it.

    Example::

        >>> import contextlib, io
        >>> with contextlib.redirect_stderr(io.StringIO()) as errors:
        ...     main(["no/such/folder"])
        2
        >>> print(errors.getvalue().strip())
        report: no/such/folder is no directory; give the directory that a logger wrote to
    """
    parser = argparse.ArgumentParser(
        prog="python -m lightning_curvadion report",
        description="Write report.html, one page without scripts that opens offline, and its figures as PNG beside it.",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN_DIR", help="where CSVLogger or TensorBoardLogger wrote, or above it"
    )
    parser.add_argument("--output", type=Path, default=Path("report"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--loss", metavar="KEY", help="key of the training loss, where it is none of the usual ones")
    parser.add_argument("--val-loss", metavar="KEY", help="key of the validation loss, likewise")
    options = parser.parse_args(args)
    try:
        page = build_report(options.runs, options.output, options.loss, options.val_loss)
    except (ReportError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(page)
    return 0


def build_report(
    runs: Sequence[Path | str], output: Path | str, loss: str | None = None, val_loss: str | None = None
) -> Path:
    """Write ``report.html`` and its figures into a folder.

    Args:
        runs: A directory for each run: with its logs, or with those of several versions below it, of which the newest
            counts. Of several runs the page compares the losses too.
        output: The folder; it is made.
        loss: Key of the training loss; ``None`` takes the usual ones.
        val_loss: Key of the validation loss, likewise.

    Returns:
        The path of the page.

    Raises:
        ReportError: If a directory has no logs, no run logged a key that was named, or a library is not installed.

    Example::

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "metrics.csv").write_text("loss,step\\n2.5,9\\n2.25,19\\n")
        ...     page = build_report([folder], Path(folder) / "report")
        ...     page.name, "The training loss goes from 2.5 to 2.25." in page.read_text()
        ('report.html', True)
    """
    folders, output = [Path(run) for run in runs], Path(output)
    read = [read_run(path, name, loss, val_loss) for path, name in zip(folders, _names(folders), strict=True)]
    for key in (loss, val_loss):
        if key and not any(key in run.series for run in read):
            raise ReportError(f"no run logged {key!r}; {read[0].name} logged {read[0].own_keys}")
    parts = []
    output.mkdir(parents=True, exist_ok=True)
    if len(read) > 1:
        parts += ["<h2>All runs</h2>", _table(read), *_shown(draw_comparison(read), "", output)]
    for run in read:
        where = " ".join([f"From {run.source}.", *([run.note] if run.note else [])])
        parts += [f"<h2>{escape(run.name)}</h2>", f'<p class="soft">{escape(where)}</p>', _table([run])]
        parts += _shown(draw_run(run), f"{_file_name(run.name)}-", output)
    title = f"{read[0].name}: what it learnt and what it sent" if len(read) == 1 else "Runs compared"
    page = PAGE.format(title=escape(title), body="\n".join(parts))
    return _write(output / "report.html", page.encode())


def _names(folders: Sequence[Path]) -> list[str]:
    """What tells the folders apart: the last part of each, where those differ."""
    paths = [path.resolve() for path in folders]
    if len(set(paths)) < len(paths):
        raise ReportError("a directory is given twice; name each run once")
    if len({path.name for path in paths}) == len(paths):
        return [path.name for path in paths]
    parts = [path.parts for path in paths]
    while len({each[-1] for each in parts}) == 1:
        parts = [each[:-1] for each in parts]
    above = os.path.commonpath(["/".join(each) for each in parts])
    return [Path(*each).relative_to(above).as_posix() for each in parts]


def _table(runs: Sequence[Run]) -> str:
    """A line for each figure and, of several runs, a column for each run."""
    columns = [_figures(run) for run in runs]
    lines = ["".join(f"<th>{escape(name)}</th>" for name in ["", *(run.name for run in runs)])] if len(runs) > 1 else []
    for name in columns[0]:
        lines.append(f"<th>{name}</th>" + "".join(f"<td>{column[name]}</td>" for column in columns))
    return f'<div class="wide"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def _figures(run: Run) -> dict[str, str]:
    rate, sent, ddp, seconds = run.named("sync_rate"), run.named("bytes_sent"), run.ddp_bytes, run.named("seconds")
    return {
        "optimizer steps": str(run.steps),
        "sync rate": f"{100 * rate.last:.1f} %" if rate else "–",
        "sent per replica": bytes_told(sent.last) if sent else "–",
        "DDP would send": bytes_told(ddp.last) if ddp else "–",
        "of DDP": f"{told(100 * sent.last / ddp.last)} %" if ddp and ddp.last else "–",
        "last training loss": f"{run.loss.last:.4g}" if run.loss else "–",
        "last validation loss": f"{run.val_loss.last:.4g}" if run.val_loss else "–",
        "seconds": told(seconds.last) if seconds else "–",
    }


def _shown(figures: Iterable[Drawing | Missing], prefix: str, output: Path) -> list[str]:
    """The figures as HTML, each also written as a file of its own."""
    parts = []
    for figure in figures:
        parts.append(f"<h3>{escape(figure.title)}</h3>")
        if isinstance(figure, Missing):
            parts.append(f'<p class="soft">Not drawn. {escape(figure.reason)}</p>')
            continue
        _write(output / f"{prefix}{figure.name}.png", figure.png)
        data = base64.b64encode(figure.png).decode()
        image = f'<img src="data:image/png;base64,{data}" alt="{escape(figure.alt)}">'
        parts.append(f"<figure>{image}<figcaption>{escape(figure.caption)}</figcaption></figure>")
    return parts


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"


def _write(place: Path, data: bytes) -> Path:
    """Write a file beside its place and move it there, so that no half of a file is ever found."""
    part = place.with_name(f".{place.name}.part")
    try:
        part.write_bytes(data)
        os.replace(part, place)
    finally:
        part.unlink(missing_ok=True)
    return place
