"""The command ``plan``, from its arguments to its text."""

import resource

import pytest
from training import ROOT

from lightning_curvadion.cli.plan.command import main

UNMEASURED = ["--config", "configs/byte_gpt.yaml", "--latency", "20ms"]
DRIFT = ["--optimizer=CurvaDion", "--optimizer.trigger=DriftThreshold", "--optimizer.trigger.tau=0.02"]
NONE = ["--trainer.strategy.consensus=none"]
CONFIG = [*UNMEASURED, "--step-time", "0.5s", "--coding-speed", "1"]


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def run_plan(capsys, *args):
    assert main([*CONFIG, *args]) == 0
    return capsys.readouterr().out


def test_the_text_has_every_part(capsys):
    text = run_plan(capsys, "--link", "200Mbit", "--replicas", "16", "--sync-rate", "0.25")
    for words in (
        "matrices (dion)",
        "sync rate 25.0 %",
        "500.0 ms",
        "DDP",
        "gradient buckets",
        "times as fast",
        "16 replicas",
        "Kernel launches in a sync step: ",
    ):
        assert words in text


def test_the_number_of_replicas_comes_from_the_config(capsys):
    assert "on 2 replicas" in run_plan(capsys, "--link", "1gbit")


def test_a_config_for_a_cluster_is_planned_on_this_machine(capsys):
    cluster = ["--trainer.devices=8", "--trainer.num_nodes=4", "--trainer.accelerator=gpu", "--trainer.strategy=ddp"]
    text = run_plan(capsys, "--link", "25Gbit", *cluster, "--optimizer=AdamW", "--optimizer.lr=0.001")
    assert "on 32 replicas" in text and "nccl" in text
    assert "strategy is 'ddp'" in text and "AdamW" in text


def test_billions_of_parameters_take_no_memory(capsys):
    sizes = ["--model=examples.byte_gpt.ByteGPT", "--model.layers=6", "--model.width=8192", "--model.heads=64"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "4,836,139,008" in run_plan(capsys, "--link", "25Gbit", *sizes)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10**6  # kB; the parameters would be 19 GB


def test_what_is_not_given_is_measured(capsys):
    small = ["--model.layers=1", "--model.width=32", "--data.batch_size=2"]
    assert main([*UNMEASURED, "--link", "1Gbit", *small]) == 0
    text = capsys.readouterr().out
    assert "steps measured on this machine's" in text and "for other devices give --coding-speed" in text


def test_the_sync_rate_comes_from_the_logs_of_a_run(capsys, tmp_path):
    (tmp_path / "metrics.csv").write_text("curvadion/sync_rate,curvadion/rmmc,step\n0.5,0.1,9\n0.125,0.1,19\n")
    text = run_plan(capsys, "--link", "1Gbit", "--run", str(tmp_path))
    assert f"sync rate 12.5 %: logged in 20 steps of {tmp_path}; ln RMMC in its second half: mean -2.30" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--link", "200MB/s"], "200Mbit"),
        (["--link", "1Gbit", "--latency", "20"], "20ms"),
        (["--link", "1Gbit", "--replicas", "1"], "at least 2"),
        (["--link", "1Gbit", "--sync-rate", "20"], "between 0 and 1"),
        (["--link", "1Gbit", "--trainer.max_stepz=3"], "max_steps"),
        (["--link", "1Gbit", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--link", "1Gbit", "--trainer.devices=auto"], "--replicas"),
        (["--link", "1Gbit", "--run", "nowhere"], "nowhere"),
        (["--link", "1Gbit", *DRIFT], "--sync-rate"),
        (["--link", "1Gbit", *DRIFT, "--trainer.strategy=CurvaDionStrategy", *NONE], 'use consensus="average"'),
        ([], "--link"),
    ],
)
def test_bad_input_gets_one_line(capsys, args, message):
    assert main([*CONFIG, *args]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
