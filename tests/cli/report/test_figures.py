"""Figures and captions of runs that logged little, or strange values."""

import html

import pytest

from lightning_curvadion.cli.report.report import build_report

MONITORED = "curvadion/bytes_saved,curvadion/bytes_sent,curvadion/rmmc,curvadion/sync_rate"


@pytest.mark.parametrize(
    ("rows", "figures", "sentences"),
    [
        ("loss,step\n2.5,9\n2,19", 1, ["no CommunicationMonitor: give its Trainer", "No validation loss was logged"]),
        ("loss,step\n2.5,9", 0, ["one finite value, 2.5000 at step 9"]),
        ("loss,step\nnan,9\nnan,19", 0, ["training loss has no finite value", "<td>nan</td>"]),
        ("loss,step\n3,9\nnan,19\n2,29\n2,39", 1, ["not finite in 1 row, first at step 19", "from 3.0000 to 2.0000."]),
        ("my_loss,step\n3,9\n2,19", 0, ["--loss KEY takes one of my_loss"]),
        (
            f"loss,step,{MONITORED}\n3,0,8,2,inf,1",
            0,
            ["finite 0 times", "two logged rows of bytes", "only CurvaDion measures it"],
        ),
        (
            f"loss,step,{MONITORED}\n3,0,8,2,inf,1\n2,9,80,5,0.2,0.5\n2,19,90,6,0.1,0.5",
            2,
            ["a median of 0.15 and a maximum of 0.2 (step 9)"],
        ),
        ("loss,step,curvadion/local_steps\n3,9,\n2,19,\n,4,4", 1, ["Green marks 1 sync step."]),
        (
            "curvadion/bytes_sent,curvadion/drift,curvadion/local_steps,step\n5,,,9\n,0.01,9,9\n,0.03,,5",
            1,
            [
                "3 % at most (step 5). Filled: 1 sync step. Open: 1 point between steps",
                "two logged sync steps; the run has 1.",
            ],
        ),
    ],
)
def test_the_page_explains_what_is_missing(tmp_path, rows, figures, sentences):
    (tmp_path / "metrics.csv").write_text(rows)
    text = html.unescape(build_report([tmp_path], tmp_path / "report").read_text())
    assert text.count("<img ") == figures
    for sentence in sentences:
        assert sentence in text
