"""The HTML page of the report: one file without scripts or links, with its images embedded."""

import base64
from collections.abc import Iterable, Sequence
from html import escape

from ...trainer.run_metric import loss_text
from .figures import MissingFigure, ReportFigure
from .logged_run import LoggedRun
from .plotting import DARK_PAPER
from .run_settings import read_settings

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1b1b1b; --soft: #5c5c5c; --line: #d8d8d8; --paper: #ffffff; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e8e8e8; --soft: #a8a8a8; --line: #3c3c3c; --paper: {dark_paper}; }}
}}
body {{ max-width: 38rem; margin: 0 auto; padding: 1rem 0.6rem; font: 1rem/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); overflow-wrap: anywhere; }}
h1 {{ font-size: 1.5rem; }}
h2 {{ font-size: 1.25rem; margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); }}
h3 {{ font-size: 1rem; margin: 2rem 0 0.5rem; }}
p, figcaption {{ margin: 0.5rem 0; }}
.soft {{ color: var(--soft); }}
figure {{ margin: 0; }}
img {{ display: block; width: 100%; height: auto; }}
pre {{ font-size: 0.85rem; overflow-x: auto; overflow-wrap: normal; }}
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
{glossary}
</body>
</html>
"""


_GLOSSARY = {
    "RMMC": "is the relative change of a momentum's norm in a step; summed since the last sync, it decides when the"
    " replicas synchronise.",
    "Drift": "is how far a replica is from the consensus just before it takes it over, relative to the consensus's"
    " norm.",
    "Consensus": "is the average of all replicas, which each of them continues from: after a sync step, and before"
    " validation, checkpoint and end.",
}


def page_html(title: str, sections: Iterable[str]) -> str:
    """The whole page.

    Example::

        >>> "<h1>My run</h1>" in page_html("My run", ["<p>text</p>"])
        True
    """
    glossary = "".join(f"<p><b>{word}</b> {escape(meaning)}</p>" for word, meaning in _GLOSSARY.items())
    glossary = f'<h2>Words</h2>\n<div class="soft">{glossary}</div>'
    return _PAGE.format(title=escape(title), body="\n".join(sections), glossary=glossary, dark_paper=DARK_PAPER)


def heading_html(run: LoggedRun) -> str:
    r"""Name, source and date of a run, and the step at which its logs end.

    Example::

        >>> from pathlib import Path
        >>> from lightning_curvadion.cli.report.logged_run import Series
        >>> heading_html(LoggedRun("a&b", Path("logs"), {"loss": Series([4, 9], [2.5, 2.0])}))
        '<h2>a&amp;b</h2>\n<p class="soft">From logs, up to step 9, the last that was logged.</p>'
    """
    written = f", written on {run.written}" if run.written else ""
    source = f"From {run.source}{written}, up to step {run.num_steps - 1}, the last that was logged. {run.note}".strip()
    return f'<h2>{escape(run.name)}</h2>\n<p class="soft">{escape(source)}</p>'


def table_html(runs: Sequence[LoggedRun]) -> str:
    """A table with a row for each total; of several runs, with a column for each run.

    Example::

        >>> from pathlib import Path
        >>> "<tr><th>logged optimizer steps</th><td>0</td></tr>" in table_html([LoggedRun("a", Path(), {})])
        True
    """
    columns = [_totals(run) for run in runs]
    labels = dict.fromkeys(label for column in columns for label in column)
    rows = ["".join(f"<th>{escape(name)}</th>" for name in ["", *(run.name for run in runs)])] if len(runs) > 1 else []
    for label in labels:
        cells = "".join(f"<td>{escape(column.get(label, '–'))}</td>" for column in columns)
        rows.append(f"<th>{escape(label).replace('  ', '&emsp;')}</th>{cells}")
    return f'<div class="wide"><table>{"".join(f"<tr>{row}</tr>" for row in rows)}</table></div>'


def _totals(run: LoggedRun) -> dict[str, str]:
    """The rows of the closing table, with the last training loss above."""
    losses = {"last training loss": loss_text(run.loss.last)} if run.loss else {}
    losses |= {key: loss_text(series.last) for key, series in run.val_losses.items()}
    steps = {} if run.has_monitor else {"logged optimizer steps": str(run.num_steps)}
    return {**losses, **steps, **run.table}


def settings_html(run: LoggedRun) -> str:
    """The settings of a run, folded.

    Example::

        >>> from pathlib import Path
        >>> settings_html(LoggedRun("a", Path("nowhere"), {}))
        '<p class="soft">The run logged no settings.</p>'
    """
    settings = read_settings(run.source)
    if not settings:
        return '<p class="soft">The run logged no settings.</p>'
    return f"<details><summary>Settings</summary><pre>{escape(settings)}</pre></details>"


def figure_html(figure: ReportFigure | MissingFigure) -> str:
    r"""A figure with its caption, or the reason why it is missing.

    Example::

        >>> figure_html(MissingFigure("Drift at each sync", "Replicas under DDP never drift."))
        '<h3>Drift at each sync</h3>\n<p class="soft">Not plotted. Replicas under DDP never drift.</p>'
    """
    heading = f"<h3>{escape(figure.title)}</h3>"
    if isinstance(figure, MissingFigure):
        return f'{heading}\n<p class="soft">Not plotted. {escape(figure.reason)}</p>'
    light, dark = (f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in (figure.png, figure.dark_png))
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
    image = f'<picture>{source}<img src="{light}" alt="{escape(figure.alt)}"></picture>'
    return f"{heading}\n<figure>{image}<figcaption>{escape(figure.caption)}</figcaption></figure>"
