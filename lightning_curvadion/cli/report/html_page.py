"""The HTML page of the report: one file without scripts or links, with its images embedded."""

import base64
from collections.abc import Iterable, Sequence
from html import escape

from ..formatting import format_bytes, format_number
from .figures import MissingFigure, ReportFigure
from .logged_run import LoggedRun

_PAGE = """<!DOCTYPE html>
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


def page_html(title: str, sections: Iterable[str]) -> str:
    """The whole page.

    Example::

        >>> "<h1>My run</h1>" in page_html("My run", ["<p>text</p>"])
        True
    """
    return _PAGE.format(title=escape(title), body="\n".join(sections))


def heading_html(run: LoggedRun) -> str:
    r"""Name and source of a run, and the step at which its logs end.

    Example::

        >>> from pathlib import Path
        >>> from lightning_curvadion.cli.report.logged_run import Series
        >>> heading_html(LoggedRun("a&b", Path("logs"), {"loss": Series([4, 9], [2.5, 2.0])}))
        '<h2>a&amp;b</h2>\n<p class="soft">From logs, up to step 9, the last that was logged.</p>'
    """
    source = f"From {run.source}, up to step {run.num_steps - 1}, the last that was logged. {run.note}".strip()
    return f'<h2>{escape(run.name)}</h2>\n<p class="soft">{escape(source)}</p>'


def table_html(runs: Sequence[LoggedRun]) -> str:
    """A table with a row for each total; of several runs, with a column for each run.

    Example::

        >>> from pathlib import Path
        >>> "<tr><th>logged optimizer steps</th><td>0</td></tr>" in table_html([LoggedRun("a", Path(), {})])
        True
    """
    columns = [_totals(run) for run in runs]
    rows = ["".join(f"<th>{escape(name)}</th>" for name in ["", *(run.name for run in runs)])] if len(runs) > 1 else []
    for label in columns[0]:
        rows.append(f"<th>{label}</th>" + "".join(f"<td>{column[label]}</td>" for column in columns))
    return f'<div class="wide"><table>{"".join(f"<tr>{row}</tr>" for row in rows)}</table></div>'


def _totals(run: LoggedRun) -> dict[str, str]:
    rate, sent, seconds = run.metric("sync_rate"), run.metric("bytes_sent"), run.metric("seconds")
    ddp = run.ddp_bytes
    return {
        "logged optimizer steps": str(run.num_steps),
        "sync rate": f"{100 * rate.last:.1f} %" if rate else "–",
        "sent per replica": format_bytes(sent.last) if sent else "–",
        "DDP would send": format_bytes(ddp.last) if ddp else "–",
        "share of DDP": f"{format_number(100 * sent.last / ddp.last)} %" if ddp and ddp.last else "–",
        "last training loss": f"{run.loss.last:.4g}" if run.loss else "–",
        "last validation loss": f"{run.val_loss.last:.4g}" if run.val_loss else "–",
        "seconds": format_number(seconds.last) if seconds else "–",
    }


def figure_html(figure: ReportFigure | MissingFigure) -> str:
    r"""A figure with its caption, or the reason why it is missing.

    Example::

        >>> figure_html(MissingFigure("Drift at each sync", "Replicas under DDP never drift."))
        '<h3>Drift at each sync</h3>\n<p class="soft">Not plotted. Replicas under DDP never drift.</p>'
    """
    heading = f"<h3>{escape(figure.title)}</h3>"
    if isinstance(figure, MissingFigure):
        return f'{heading}\n<p class="soft">Not plotted. {escape(figure.reason)}</p>'
    data = base64.b64encode(figure.png).decode()
    image = f'<img src="data:image/png;base64,{data}" alt="{escape(figure.alt)}">'
    return f"{heading}\n<figure>{image}<figcaption>{escape(figure.caption)}</figcaption></figure>"
