"""The comparison of methods: its bookkeeping, and that its methods are what they are called."""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from examples.benchmarks import compare
from examples.benchmarks.compare_plan import BASE, QUOTED, STAGES, SWEEPS, best_rates, plan, read, with_rates
from examples.benchmarks.compare_replica import Outcome, append
from examples.benchmarks.compare_report import gap, kernel_share, of, pace, points, reached
from examples.benchmarks.methods import DEFAULT, METHODS
from lightning_curvadion import CurvaDion, CurvaDionStrategy, split_parameters

ROOT = Path(__file__).parents[2]
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
        for rates, loss in zip(SWEEPS[name], losses, strict=True)
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
    assert best_rates("DDP, Dion", rows) == SWEEPS["DDP, Dion"][1]
    assert best_rates("local SGD, H=100", rows) == SWEEPS["local SGD, H=30"][0]
    assert best_rates("DDP, AdamW", rows) == SWEEPS["DDP, AdamW"][1]  # not swept yet
    four = replace(BASE, method="DDP, Dion", replicas=4, lr=0.024, vector_lr=0.024)
    rows += rows_of(tmp_path, (four, replace(OUTCOME, val_loss=1.0)))
    assert best_rates("DDP, Dion", rows) == SWEEPS["DDP, Dion"][1]
    assert best_rates("DDP, Dion", rows, replicas=4) == (0.024, 0.024)
    assert best_rates("local SGD, H=30", rows, replicas=4) == SWEEPS["local SGD, H=30"][0]
    assert all((method.sweep or name) in SWEEPS for name, method in METHODS.items())


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_names_methods_that_there_are(stage):
    runs = plan(stage, [])
    assert runs and {run.method for run in runs} <= set(METHODS)
    assert len(set(runs)) == len(runs)


def test_figures_of_a_row(tmp_path):
    rates = SWEEPS["DDP, Dion"][1]
    run = with_rates(replace(BASE, method="DDP, Dion"), rates)
    rows = rows_of(
        tmp_path,
        *swept("DDP, Dion", [2.1, 2.0, 2.2]),
        (replace(run, seed=1), replace(OUTCOME, val_loss=2.2)),
        (replace(run, rate="20mbit", stop=60), OUTCOME),
    )
    mine = of(rows, method="DDP, Dion")
    assert [(row.run.seed, row.run.lr, row.run.vector_lr) for row in mine] == [(0, *rates), (1, *rates)]
    assert reached(mine[0], 2.25) == (300, 300)
    assert reached(mine[0], 3.5) == (100, 100)
    assert reached(mine[0], 1.9) is None
    assert pace(rows, "DDP, Dion", "20mbit") == 15
    assert gap(mine[1:], mine) == 0
    assert gap(mine[:1], [replace(mine[0], outcome=replace(OUTCOME, val_loss=1.6))]) == pytest.approx(25)
    half = replace(mine[0], outcome=replace(OUTCOME, kernel_total=300))
    assert kernel_share(half, mine[:1]) == pytest.approx(50)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 6, bias=False)
        self.norm = nn.LayerNorm(6)


@pytest.mark.parametrize("name", [name for name in METHODS if name in QUOTED or "outer" in name])
def test_methods_step_with_the_rates_they_are_given(name):
    torch.manual_seed(0)
    net = Net()
    before = copy.deepcopy(net)
    inner = METHODS[name].inner
    optimizer = METHODS[name].optimizer(split_parameters(net), lr=0.5, vector_lr=0.25)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[net.body.weight] == 0.5
    assert rates[net.norm.weight] == 0.25
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    optimizer.step()
    # AdamW's first step is the rate in every coordinate; Dion's three (rank 1/2)
    # unit columns, Muon's singular values of about one.
    torch.testing.assert_close((net.norm.weight - before.norm.weight).abs(), torch.full((6,), rates[net.norm.weight]))
    moved = (net.body.weight - before.body.weight).norm().item()
    expected = {"adamw": 48**0.5, "muon": 6**0.5, "dion": (6 / 8 * 3) ** 0.5}[inner]
    assert moved == pytest.approx(0.5 * expected, rel=0.2 if inner == "muon" else 1e-3)


def test_methods_are_what_they_are_called():
    for name, method in METHODS.items():
        assert isinstance(method.strategy(), DDPStrategy)
        others = name.startswith("DDP") or name == "no communication"
        assert isinstance(method.strategy(), CurvaDionStrategy) != others
    assert METHODS[DEFAULT].hook == {} and METHODS[DEFAULT].options == {}
    optimizer = METHODS["local SGD, H=30"].optimizer(split_parameters(Net()), lr=0.1, vector_lr=0.1)
    assert isinstance(optimizer, CurvaDion)
    assert [optimizer._cap.decide(1.0) for _ in range(60)].count(True) == 2


@pytest.fixture(scope="module")
def smoked(tmp_path_factory):
    """The smoke run's folder and what it printed."""
    folder = tmp_path_factory.mktemp("smoke")
    command = [sys.executable, ROOT / "examples/benchmarks/compare.py", "--smoke", folder]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # it draws
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=230)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def test_the_smoke_run_trains_times_tells_and_draws(smoked):
    folder, told = smoked
    assert "| ours: defaults | " in told
    assert {path.name for path in folder.iterdir()} >= {"loss_against_bytes.png", "loss_against_seconds.png"}


def test_a_run_does_not_notice_how_often_it_is_looked_at(smoked, tmp_path):
    (twice,) = [row for row in read(smoked[0] / "compare.csv") if row.run.method == DEFAULT and not row.run.rate]
    compare.run([twice.run], tmp_path / "often.csv", 5, val_sequences=64)
    (five_times,) = read(tmp_path / "often.csv")
    once, often = twice.outcome, five_times.outcome
    assert len(points(twice)) == 2 and len(points(five_times)) == 5 and points(five_times)[-1][1] == often.val_loss
    assert (once.val_loss, once.sync_steps, once.payload) == (often.val_loss, often.sync_steps, often.payload)
    if once.kernel_steps >= 0:
        assert often.kernel_steps == pytest.approx(once.kernel_steps, rel=0.05)
        # The consensus at the end carries the optimizer's state: more than the parameters' 0.5 MB.
        assert once.payload < once.kernel_steps < once.kernel_total - 500_000
