"""The command ``plan``, from its arguments to its text."""

import re
import resource
import sys

import pytest
from training import ROOT

from lightning_curvadion.cli.main import CurvaDionCLI
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


def test_speeds_and_shares_are_understood_in_the_spellings_of_the_field(capsys):
    text = run_plan(capsys, "--link", "10Gbps", "--sync-rate", "20%")
    assert "on a link of 10 Gbit/s" in text and "sync rate 20.0 %" in text
    assert text == run_plan(capsys, "--link", "10 Gb/s", "--sync-rate", "0.2")


def test_the_text_has_every_part(capsys):
    text = run_plan(capsys, "--link", "200Mbit", "--replicas", "16", "--sync-rate", "0.25", *delays(0, 0))
    for words in (
        "matrices (Muon)",
        "sync rate 25.0 %",
        "500.0 ms",
        "DDP",
        "gradient buckets",
        "times as fast",
        "of it waiting: agreement                360.0 ms",
        "16 replicas",
        "Kernel launches in a sync step: ",
    ):
        assert words in text


def delays(lag, overlap):
    strategy = "--trainer.strategy"
    return [f"{strategy}=CurvaDionStrategy", f"{strategy}.lag={lag}", f"{strategy}.overlap={overlap}"]


def test_the_advised_lag_and_overlap_hide_all_that_was_waited_for(capsys):
    distant = ["--link", "1Gbit", "--replicas", "32", "--sync-rate", "0.05"]
    text = run_plan(capsys, *distant, *delays(0, 0))
    waited = re.findall(r"of it waiting: [a-z ]+ (\d\S*) m?s", text)
    assert len(waited) == 3 and "0.0" not in waited
    lag, overlap, promised = re.search(r"lag=(\d+), overlap=(\d+) \((\S+ ms) at 5.0 % sync\)", text).groups()
    advised = run_plan(capsys, *distant, *delays(lag, overlap))
    assert re.findall(r"of it waiting: [a-z ]+ (\d\S*) m?s", advised) == ["0.0"] * 3
    assert re.search(r"mean step, 5.0 % sync +(\S+ ms)", advised)[1] == promised
    assert "is shortest" in text and "is shortest" not in advised
    assert "copies of a mean under way                     0 B" in text
    assert "copies of a mean under way                 1.97 MB" in advised


def test_a_config_that_cannot_overlap_is_advised_a_lag_alone(capsys):
    factors = [*delays(0, 0), "--trainer.strategy.consensus=factors"]
    text = run_plan(capsys, "--link", "1Gbit", "--replicas", "32", "--sync-rate", "0.05", *factors)
    assert re.search(r"shortest with lag=\d+ \(", text)


def test_the_number_of_replicas_comes_from_the_config(capsys):
    assert "on 2 replicas" in run_plan(capsys, "--link", "1gbit")


def test_a_config_for_a_cluster_is_planned_on_this_machine(capsys):
    cluster = ["--trainer.devices=8", "--trainer.num_nodes=4", "--trainer.accelerator=gpu", "--trainer.strategy=ddp"]
    text = run_plan(capsys, "--link", "25Gbit", *cluster, "--optimizer=AdamW", "--optimizer.lr=0.001")
    assert "on 32 replicas" in text and "nccl" in text
    assert "strategy is 'ddp'" in text and "AdamW" in text


REPLICAS_OF_8 = ["--trainer.devices=8", "--trainer.num_nodes=4", "--trainer.accelerator=gpu"]
NODES = [*REPLICAS_OF_8, "--trainer.strategy=CurvaDionStrategy", "--trainer.strategy.replica_size=node"]


def test_the_processes_of_a_replica_share_its_link(capsys):
    by_name = run_plan(capsys, "--link", "25Gbit", *REPLICAS_OF_8, "--trainer.strategy=curvadion_node")
    assert "on 4 replicas" in by_name and "A replica has 8 processes" in by_name
    # What backward does not hide: the last bucket.
    inside = run_plan(capsys, "--link", "25Gbit", *NODES, "--inner-link", "1Gbit")
    (seconds,) = re.findall(r"compute (\d+\.\d) ms .* at --inner-link", inside)
    assert 500.0 < float(seconds) < 520.0


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
        (["--link", "0Gbit"], "--link must be above 0"),
        (["--link", "-5Gbit"], "--link must be above 0"),
        (["--link", "1Gbit", "--latency", "20"], "20ms"),
        (["--link", "1Gbit", "--latency", "-3ms"], "--latency cannot be negative"),
        (["--link", "1Gbit", "--step-time", "0s"], "--step-time must be above 0"),
        (["--link", "1Gbit", "--step-time", "-1s"], "--step-time cannot be negative"),
        (["--link", "1Gbit", "--coding-speed", "0"], "--coding-speed must be above 0"),
        (["--link", "1Gbit", "--replicas", "1"], "at least 2"),
        (["--link", "1Gbit", "--replicas", "-3"], "at least 2"),
        (["--link", "1Gbit", "--replicas", "few"], "a whole number of at least 2"),
        (["--link", "1Gbit", "--sync-rate", "20"], "between 0 and 1, such as 0.2 or 20%"),
        (["--link", "1Gbit", "--sync-rate", "-1%"], "between 0 and 1"),
        (["--link", "1Gbit", "--sync-rate", "often"], "between 0 and 1"),
        (["--link", "1Gbit", "--trainer.devices=auto"], "--replicas"),
        (["--link", "1Gbit", "--run", "nowhere"], "nowhere"),
        (["--link", "1Gbit", *DRIFT], "--sync-rate"),
        (["--link", "1Gbit", *DRIFT, "--trainer.strategy=CurvaDionStrategy", *NONE], 'use consensus="average"'),
        (["--link", "1Gbit", "--inner-link", "fast"], "--inner-link is a speed"),
        (["--link", "1Gbit", "--inner-link", "1Gbit"], "set replica_size"),
        (["--link", "1Gbit", *NODES, "--trainer.strategy.replica_size=3"], "choose one of 1, 2, 4, 8, 16, 32"),
        ([], "--link"),
    ],
)
def test_bad_input_gets_one_line(capsys, args, message):
    assert main([*CONFIG, *args]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def message_of_fit(capsys, *args):
    """What ``fit`` says of a bad config. Nothing is trained, whatever it thinks of it."""
    with pytest.raises(SystemExit):
        CurvaDionCLI(args=[*args], run=False)
    return capsys.readouterr().err.partition("error: ")[2].strip()


@pytest.mark.parametrize(
    ("config", "option", "part"),
    [
        ("configs/byte_gpt.yaml", "--optimizer.lrr=3", "Option 'lrr' is not accepted"),
        ("configs/byte_gpt.yaml", "--trainer.max_stepz=3", "max_steps"),
        ("nowhere.yaml", "--trainer.max_steps=3", "nowhere.yaml"),
        ("configs/digits_vit.yaml", "--trainer.max_steps=3", "needs scikit-learn: pip install scikit-learn"),
    ],
)
def test_a_bad_config_gets_the_message_of_fit(capsys, monkeypatch, config, option, part):
    for module in [name for name in sys.modules if name.startswith("sklearn.")] + ["sklearn"]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "examples.digits_vit", raising=False)
    of_fit = message_of_fit(capsys, "--config", config, option)
    assert main(["--link=1Gbit", "--latency=1ms", "--config", config, option]) == 2
    assert part in of_fit
    assert capsys.readouterr().err == f"plan: {of_fit}\n"


def test_without_a_sync_rate_both_ends_of_what_was_measured_are_planned(capsys):
    text = run_plan(capsys, "--link", "10Mbit")
    assert "sync rate 10.0 to 69.3 %" in text
    low, high = (re.search(rf"mean step, {rate} % sync +(\S+) ms", text)[1] for rate in ("10.0", "69.3"))
    fastest, slowest = re.search(r"10 Mbit/s .*? ms +(\S+) to (\S+)\n", text).groups()
    assert 500 < float(low) < float(high) and 1 < float(fastest) < float(slowest)
    parts = dict(re.findall(r"^  (steps|validation|checkpoints) +\d+ +(\S.*)$", text, flags=re.M))
    fewest, most = (float(number) for number in parts.pop("steps").removesuffix(" MB").split(" to "))
    # The main job sent 8.83 MB in steps, 1.75 kB at its ends, and these for its two validations and its checkpoint.
    assert fewest < 8.83 < most and parts == {"validation": "3.94 MB", "checkpoints": "2.32 MB"}
    assert re.search(r"start and end +1.75 kB", text)


def test_where_only_the_data_tells_the_payload_of_each_is_given(capsys):
    assert main(["--config", "configs/digits_vit.yaml", *CONFIG[2:], "--link", "1Gbit"]) == 0
    text = capsys.readouterr().out
    assert "the data decides on the number of" in text and re.search(r"validations +841 kB", text)
