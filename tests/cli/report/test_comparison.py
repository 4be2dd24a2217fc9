"""Figures that compare runs."""

from lightning_curvadion.cli.report.report import build_report


def test_runs_that_logged_no_seconds_are_named(tmp_path):
    for name, key in (("a", "curvadion/seconds"), ("b", "curvadion/seconds"), ("c", "else")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text(f"loss,step,{key}\n3,9,1\n2,19,2\n")
    text = build_report([tmp_path / name for name in "abc"], tmp_path / "report").read_text()
    assert "a ends at 2.0000 after 2 s and b ends at 2.0000 after 2 s. Without a line: c (" in text
    assert "Not plotted. Without a line: a, b and c" in text
