"""Replicas of a Trainer's run that are lost and that come, and what becomes of the others."""

import csv
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from itertools import chain
from unittest import mock

import elastic_features
import kill_points
import lightning.pytorch as pl
import preloaded
import pytest
import torch
from ahead import ahead
from elastic_run import TRAINER, a_run
from launching import environment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.precision import MixedPrecision

from lightning_curvadion import CurvaDion, CurvaDionStrategy, split_parameters
from lightning_curvadion.trainer.elastic_strategy import ElasticStrategy

# Of a net that learns a function of eleven tokens.
TASK = {"samples": 480, "decay": 100, "sleep": 0.03, "hook": {}}


def loses_and_gains(folder):
    """The first of three is killed, another one comes, and one leaves."""
    with a_run(folder, TRAINER, epochs=2, workers=1, **TASK) as run:
        run.add("a", "b", "c")
        run.wait_until(lambda: all(run.step(name) >= 8 and run.size(name) == 3 for name in "abc"))
        first = next(name for name in "abc" if run.lines(name)[-1]["rank"] == 0)
        run.processes[first].kill()
        run.add("d")
        run.wait_until(lambda: run.size("d") == 3 and run.step("d") >= 0)
        left = [name for name in "abcd" if name != first]
        run.processes[left[0]].send_signal(signal.SIGTERM)
        return run, first, left[0], run.ends(*left[1:])


def begins_alone(folder):
    """One trains alone, and two come."""
    with a_run(folder, TRAINER, epochs=2, min_replicas=1, **TASK) as run:
        run.add("a")
        run.wait_until(lambda: run.step("a") >= 5)
        run.add("b", "c")
        return run, run.ends("a", "b", "c")


def stands_still(folder):
    """One is stopped for a while, and another one stands still in a batch, though its process lives."""
    with a_run(folder, TRAINER, epochs=2, timeout=3, still={"c": 12}, **TASK) as run:
        run.add("a", "b", "c")
        run.wait_until(lambda: all(run.size(name) == 3 and run.step(name) >= 5 for name in "abc"))
        run.wait_until(lambda: all(run.size(name) == 2 for name in "ab"))
        run.add("d")
        run.wait_until(lambda: all(run.size(name) == 3 for name in "abd"))
        run.processes["b"].send_signal(signal.SIGSTOP)
        run.wait_until(lambda: all(run.size(name) == 2 for name in "ad"))
        run.processes["b"].send_signal(signal.SIGCONT)
        ends = run.ends("a", "d")
        run.wait_until(lambda: all(run.processes[name].poll() is not None for name in "bc"))
        return run, ends


def on_one_machine(folder):
    """One command starts two processes and the store; one of them is killed."""
    script = folder / "train.py"
    script.write_text(ONE_COMMAND)
    process = preloaded.start(script, folder=folder, output=folder / "log", **environment(OMP_NUM_THREADS="1"))
    status = process.wait(timeout=120)
    return status, (folder / "log").read_text()


class Model(BoringModel):
    def configure_optimizers(self):
        return CurvaDion(split_parameters(self), lr=0.01)


ONE_COMMAND = """
import os, signal
import lightning.pytorch as pl
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning_curvadion import CommunicationMonitor, CurvaDion, CurvaDionStrategy, split_parameters

class Model(BoringModel):
    def configure_optimizers(self):
        return CurvaDion(split_parameters(self), lr=0.01)

    def on_train_batch_start(self, batch, batch_idx):
        if self.trainer.local_rank == 1 and self.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

trainer = pl.Trainer(
    accelerator="cpu", devices=2, strategy=CurvaDionStrategy(elastic=True), max_epochs=1, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, callbacks=CommunicationMonitor(), limit_val_batches=2,
)
trainer.fit(Model())
print("LEFT", trainer.world_size, trainer.global_step)
"""
SCENARIOS = {
    "loses and gains": loses_and_gains,
    "begins alone": begins_alone,
    "stands still": stands_still,
    "one machine": on_one_machine,
}
# The rest: python tests/kill_points.py
POINTS = [("checkpoint", 0)]


@ahead
def runs(folder):
    """All at once, since their replicas wait for each other most of the time."""

    def killed(point, rank):
        return kill_points.kill_at(folder / point, point, rank, step=20)

    with ThreadPoolExecutor(3) as threads:
        for name in (*SCENARIOS, *(point for point, _ in POINTS)):
            (folder / name).mkdir()
        jobs = {name: threads.submit(scenario, folder / name) for name, scenario in SCENARIOS.items()}
        return jobs | {point: threads.submit(killed, point, rank) for point, rank in POINTS}


def drawn(run, names, epoch):
    """Samples of an epoch that some replicas trained on."""
    lines = chain.from_iterable(run.lines(name) for name in names)
    return [sample for line in lines if line.get("epoch") == epoch and "samples" in line for sample in line["samples"]]


@pytest.mark.parametrize(("point", "rank"), POINTS)
def test_the_others_train_on_where_one_is_killed_at_any_point(runs, point, rank):
    assert kill_points.check(*runs[point].result()) < 15


def test_replicas_are_lost_and_come_and_leave_while_the_others_train(runs):
    run, first, leaver, ends = runs["loses and gains"].result()
    assert run.processes[first].wait() == -signal.SIGKILL
    assert len({(end["digest"], end["end"]) for end in ends}) == 1
    # Uniform over the tokens is 2.4.
    assert ends[0]["loss"] < 0.5
    changes = ends[0]["changes"]
    assert [(change["kind"], change["members"]) for change in changes[-3:]] == [("loss", 2), ("join", 3), ("loss", 2)]
    for epoch in (0, 1):
        samples = drawn(run, "abcd", epoch)
        assert len(samples) == len(set(samples))
    # Of what the lost ones had drawn some is skipped, and of every epoch what makes no batch for all.
    skipped = sum(change["skipped"] for change in changes)
    assert len(drawn(run, "abcd", 0)) + len(drawn(run, "abcd", 1)) >= 2 * (480 - 12) - skipped
    # All are at one place, and the learning rate goes with the steps.
    for name in "abcd":
        for line in run.lines(name):
            if "lr" in line:
                assert line["lr"] == pytest.approx(0.02 * (1 - 0.9 * min(1, line["step"] / 100)))
    assert run.processes[leaver].wait() == 0, run.text(leaver)[-3000:]


def test_whoever_writes_logs_and_checkpoints_is_followed_by_another_one(runs):
    run, *_, ends = runs["loses and gains"].result()
    files = sorted((run.folder / "logs").glob("*/metrics.csv"))
    assert len(files) >= 2
    steps = sorted({int(row["step"]) for file in files for row in csv.DictReader(file.open()) if row["loss"]})
    assert max(steps) > ends[0]["end"] - 10
    saved = sorted(run.folder.glob("*.ckpt"))
    assert [torch.load(file, weights_only=True)["global_step"] for file in saved] == [
        int(file.stem.removeprefix("step=")) for file in saved
    ]
    assert len(saved) == ends[0]["end"] // 25


def test_a_run_may_begin_with_one(runs):
    run, ends = runs["begins alone"].result()
    assert len({(end["digest"], end["end"], end["epoch"]) for end in ends}) == 1
    assert sum(change["joined"] for change in run.lines("a")[-1]["changes"]) == 2
    for name in "bc":
        first = next(line for line in run.lines(name) if "batch" in line)
        assert first["step"] >= 5 and first["rank"] > 0
        assert first["size"] == next(line for line in run.lines("a") if line.get("step") == first["step"])["size"]
    for epoch in (0, 1):
        samples = drawn(run, "abc", epoch)
        assert len(samples) == len(set(samples)) >= 480 - 12


def test_one_that_stands_still_is_lost_and_says_so_when_it_wakes(runs):
    run, ends = runs["stands still"].result()
    assert len({(end["digest"], end["end"]) for end in ends}) == 1
    for name in "bc":
        assert run.processes[name].wait() == 1 and "LeftBehindError: Start this replica again" in run.text(name)


def test_one_command_on_one_machine_needs_no_store(runs):
    status, output = runs["one machine"].result()
    assert status == 0, output[-3000:]
    assert "LEFT 1 " in output and "replicas lost" in output, output[-3000:]


def test_a_feature_trains_as_where_nobody_comes_or_goes(tmp_path):
    elastic_features.check(*elastic_features.train(("loops", "validation within an epoch"), tmp_path))


# -- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_replicas": 2}, "min_replicas: only with elastic=True"),
        ({"elastic": True, "min_replicas": 0}, "min_replicas must be at least 1"),
        ({"elastic": True, "replica_size": 2}, "leave out replica_size"),
        ({"elastic": True, "process_group_backend": "nccl"}, "process_group_backend='nccl' is not supported"),
        ({"elastic": True, "start_method": "fork"}, "start_method='fork' ends all processes"),
    ],
)
def test_arguments_that_do_not_fit_are_one_clear_error(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        CurvaDionStrategy(**arguments)


@pytest.fixture
def alone():
    """A run of one replica in this process."""
    others = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "MASTER_PORT")}
    others.pop("LOCAL_RANK", None)
    with mock.patch.dict(os.environ, others, clear=True), mock.patch.object(ElasticStrategy, "_is_host", False):
        yield partial(pl.Trainer, accelerator="cpu", devices=1, strategy=CurvaDionStrategy(elastic=True), logger=False)
        torch.distributed.destroy_process_group()


def test_a_loss_scale_is_refused(alone):
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(MisconfigurationException, match='use "bf16-mixed"'):
        alone(plugins=plugin).fit(Model())


class Broadcasts(pl.Callback):
    def on_train_start(self, trainer, module):
        assert trainer.strategy.broadcast(["a", 1, None]) == ["a", 1, None]
        trainer.strategy.broadcast(self)


def test_objects_are_not_sent_to_be_unpickled(alone, tmp_path):
    with pytest.raises(TypeError, match=r"broadcast strings, numbers and lists .* not Broadcasts"):
        alone(callbacks=Broadcasts(), default_root_dir=tmp_path, max_steps=1).fit(Model())


def test_an_address_without_a_store_says_how_to_start_one(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    strategy = CurvaDionStrategy(elastic=True, timeout=timedelta(seconds=1))
    trainer = pl.Trainer(accelerator="cpu", devices=1, strategy=strategy, logger=False)
    with pytest.raises(MisconfigurationException, match="lightning_curvadion store --port 1"):
        trainer.strategy.setup_environment()
