"""Tables and plans of the comparison, and a smoke run of it."""

import sys
from dataclasses import replace

import pytest
from ahead import ahead
from launching import outputs, start

from examples.benchmarks import compare
from examples.benchmarks.compare_plan import BASE, STAGES, SWEEPS, Row, best_rates, plan, read, with_rates
from examples.benchmarks.compare_replica import Outcome, append
from examples.benchmarks.compare_report import gap, gap_cell, kernel_share, pace, points, reached, rows_at
from examples.benchmarks.methods import DEFAULT, METHODS
from examples.benchmarks.netlab import missing

OUTCOME = Outcome(
    val_loss=2.0,
    sync_steps=3,
    payload=10,
    kernel_steps=400,
    kernel_total=600,
    seconds=4.0,
    peak_mib=1.5,
    spread=0.25,
    curve="100:3.0:100:1.0:1 200:2.5:200:2.0:2 400:2.0:400:4.0:3",
)


def rows_of(tmp_path, *entries):
    path = tmp_path / "rows.csv"
    for run, outcome in entries:
        append(path, run, outcome)
    return read(path)


def swept(name, losses):
    return [
        (with_rates(replace(BASE, method=name), rates), replace(OUTCOME, val_loss=loss))
        for rates, loss in zip(SWEEPS[2][name], losses, strict=True)
    ]


def test_rows_survive_the_csv_and_the_newest_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPARE_COMMIT", "abc")
    run = replace(BASE, method="DDP, Dion", lr=0.012, rate="20mbit", stop=60)
    rows = rows_of(tmp_path, (run, OUTCOME), (replace(run, seed=1), OUTCOME), (run, replace(OUTCOME, val_loss=1.0)))
    assert [(row.run, row.outcome.val_loss, row.commit) for row in rows] == [
        (run, 1.0, "abc"),
        (replace(run, seed=1), 2.0, "abc"),
    ]


def test_every_method_takes_the_best_rate_of_its_sweep(tmp_path):
    rows = rows_of(tmp_path, *swept("DDP, Dion", [2.0, 1.9, 2.1]), *swept("local SGD, H=30", [1.5, 1.6, 1.7]))
    assert best_rates("DDP, Dion", rows) == SWEEPS[2]["DDP, Dion"][1]
    assert best_rates("local SGD, H=100", rows) == SWEEPS[2]["local SGD, H=30"][0]
    assert best_rates("DDP, AdamW", rows) == SWEEPS[2]["DDP, AdamW"][1]  # not swept yet
    four = replace(BASE, method="DDP, Dion", replicas=4, lr=0.024, vector_lr=0.024)
    rows += rows_of(tmp_path, (four, replace(OUTCOME, val_loss=1.0)))
    assert best_rates("DDP, Dion", rows) == SWEEPS[2]["DDP, Dion"][1]
    assert best_rates("DDP, Dion", rows, replicas=4) == (0.024, 0.024)
    assert best_rates("local SGD, H=30", rows, replicas=4) == SWEEPS[2]["local SGD, H=30"][0]
    assert all((method.sweep or name) in SWEEPS[2] for name, method in METHODS.items())


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_distinct_runs_of_known_methods(stage):
    runs = plan(stage, [])
    assert runs and {run.method for run in runs} <= set(METHODS)
    assert len(set(runs)) == len(runs)


def test_figures_of_the_tables(tmp_path):
    rates = SWEEPS[2]["DDP, Dion"][1]
    run = with_rates(replace(BASE, method="DDP, Dion"), rates)
    rows = rows_of(
        tmp_path,
        *swept("DDP, Dion", [2.1, 2.0, 2.2]),
        (replace(run, seed=1), replace(OUTCOME, val_loss=2.2)),
        (replace(run, rate="20mbit", stop=60), OUTCOME),
    )
    mine = rows_at(rows, method="DDP, Dion")
    assert [(row.run.seed, row.run.lr, row.run.vector_lr) for row in mine] == [(0, *rates), (1, *rates)]
    assert reached(mine[0], 2.25) == (300, 300)
    assert reached(mine[0], 3.5) == (100, 100)
    assert reached(mine[0], 1.9) is None
    assert pace(rows, "DDP, Dion", "20mbit") == 15
    assert gap(mine[1:], mine) == 0
    assert gap(mine[:1], [replace(mine[0], outcome=replace(OUTCOME, val_loss=1.6))]) == pytest.approx(25)
    goal = [Row(replace(run, seed=seed), replace(OUTCOME, val_loss=2.0), "") for seed in range(5)]
    losses = [2.0, 2.1, 2.2, 2.3, 2.4]
    above = [replace(row, outcome=replace(OUTCOME, val_loss=x)) for row, x in zip(goal, losses, strict=True)]
    # The standard deviation is 0.158.
    assert gap_cell(above, goal) == "+10.00 ± 3.54 %" and gap_cell(above[:4], goal) == "+7.50 %"
    half = replace(mine[0], outcome=replace(OUTCOME, kernel_total=300))
    assert kernel_share(half, mine[:1]) == pytest.approx(50)


# Runs a script that may import what helpers/lean hides. Its replicas may not, and start sooner.
WITH_MATPLOTLIB = (
    "import runpy, sys; del sys.modules['matplotlib'], sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


@ahead
def smoke_run(folder):
    """The folder of ``compare.py --smoke`` and what it printed."""
    command = [sys.executable, "-c", WITH_MATPLOTLIB, "examples/benchmarks/compare.py", "--smoke", folder]
    (printed,) = outputs(start(*command), timeout=200)
    return folder, printed


def test_the_smoke_run_trains_and_prints_and_draws(smoke_run):
    folder, printed = smoke_run
    assert "| ours: defaults | " in printed
    assert {path.name for path in folder.iterdir()} >= {"loss_against_bytes.png", "loss_against_seconds.png"}


# Where there can be no lab, a run of it has the port that a run ahead may have.
@pytest.mark.alone
def test_evaluations_change_neither_a_run_nor_its_count(smoke_run, tmp_path):
    rows = {row.run.rate: row for row in read(smoke_run[0] / "compare.csv") if row.run.method == DEFAULT}
    twice = rows[""]
    if missing():
        compare.run([twice.run], tmp_path / "three.csv", 3, val_sequences=64)
        (three_times,) = read(tmp_path / "three.csv")
    else:
        three_times = rows[compare.RATES[-1]]
    once, often = twice.outcome, three_times.outcome
    assert len(points(twice)) == 2 and len(points(three_times)) == 3 and points(three_times)[-1][1] == often.val_loss
    assert (once.val_loss, once.sync_steps, once.payload) == (often.val_loss, often.sync_steps, often.payload)
    if not missing():
        assert often.kernel_steps == pytest.approx(once.kernel_steps, rel=0.05)
        # The consensus at the end carries the optimizer's state: more than the parameters' 0.5 MB.
        assert once.payload < once.kernel_steps < once.kernel_total - 500_000
