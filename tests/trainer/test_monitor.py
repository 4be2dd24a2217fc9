"""``CommunicationMonitor`` on real replicas: what it logs, prints and warns of."""

import contextlib
import csv
import io
import os
import re

import lightning.pytorch as pl
import pytest
import torch
from guide import names_defined_in
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from replicas import counted_collectives
from training import Member, Module, trainer_for

from lightning_curvadion import CommunicationMonitor, CurvaDionStrategy, EveryNSteps
from lightning_curvadion.cli.report.log_readers import read_run
from lightning_curvadion.trainer.formatting import format_bytes, format_percent
from lightning_curvadion.trainer.run_metric import METRICS


def fit(rank, world, folder, with_monitor, strategy=None, trigger=None, ckpt_path=None, options=None, **more):
    """A fit that rank 0 logs in the folder: its collectives, and what it prints."""
    more = {**(options or {}), **more}
    pl.seed_everything(0, verbose=False)
    module = Module(trigger=trigger or EveryNSteps(3))
    monitor = CommunicationMonitor()
    printed = io.StringIO()
    with counted_collectives() as calls, contextlib.redirect_stdout(printed):
        trainer = trainer_for(
            rank,
            world,
            CurvaDionStrategy(**(strategy or {})) if strategy != "ddp" else "ddp",
            callbacks=([monitor] if with_monitor else []) + more.pop("more_callbacks", []),
            logger=CSVLogger(folder, name="", version=""),
            log_every_n_steps=4,
            num_sanity_val_steps=0,
            **{"max_steps": 12, "val_check_interval": 6, **more},
        )
        trainer.fit(module, ckpt_path=ckpt_path)
        sent = trainer.strategy.sync.bytes_sent if strategy != "ddp" else None
    own_calls = calls.of("lightning_curvadion.sync.collectives")
    counted = sum(size for _, size in own_calls)
    return {
        "calls": list(calls),
        "sent": (sent, int(monitor.bytes_sent.sent), counted),
        "printed": printed.getvalue(),
    }


def table_of(printed):
    return dict(re.findall(r"^  (\S.*?|  in .*?|  at .*?)  +(\S.*)$", printed, flags=re.M))


def rows(folder):
    with open(folder / "metrics.csv") as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def monitored(replicas, tmp_path_factory):
    """The folder of a fit with the monitor, and what each rank returned."""
    folder = tmp_path_factory.mktemp("monitored")
    return folder, replicas.run(2, fit, str(folder), True, {"lag": 0}, timeout=120)


def test_it_logs_at_the_trainers_interval_and_every_sync_step_once(monitored):
    logged = rows(monitored[0])
    *at_interval, _ = [row for row in logged if "curvadion/sync_rate" in row]
    assert [int(row["step"]) for row in at_interval] == [3, 7, 11]
    expected = {"rmmc", "sync_rate", "steps_since_sync", "bytes_sent", "bytes_saved", "seconds", "rmmc_group/matrices"}
    expected |= {"rmmc_group/first_moments", "rmmc_layer/first_moments"}
    layers = {f"rmmc_layer/net.{kind}.{number}" for kind in ("up", "down") for number in (0, 1)}
    for row in at_interval:
        assert {f"curvadion/{name}" for name in expected | layers} <= row.keys()
        by_layer = [float(row[f"curvadion/{name}"]) for name in layers]
        assert float(row["curvadion/rmmc_group/matrices"]) == pytest.approx(max(by_layer))
        # Of all replicas, where the groups are of this one.
        assert float(row["curvadion/rmmc"]) >= max(by_layer) * (1 - 1e-6)
    assert [float(row["curvadion/steps_since_sync"]) for row in at_interval] == [1, 2, 0]
    assert [float(row["curvadion/sync_rate"]) for row in at_interval] == pytest.approx([1 / 4, 2 / 8, 4 / 12])
    syncs = [row for row in logged if "curvadion/local_steps" in row]
    assert [(int(row["step"]), float(row["curvadion/local_steps"])) for row in syncs] == [
        (2, 2),
        (5, 2),
        (8, 2),
        (11, 2),
    ]
    assert all(0 < float(row["curvadion/drift"]) < 1 for row in syncs)
    last = at_interval[-1]
    gradients = 4 * sum(parameter.numel() for parameter in Module().parameters())
    assert float(last["curvadion/bytes_sent"]) + float(last["curvadion/bytes_saved"]) == 12 * gradients


def test_the_table_has_the_bytes_that_were_sent(monitored):
    for sent, in_metric, counted in (rank["sent"] for rank in monitored[1]):
        assert sent == in_metric == counted > 0
    rank0, rank1 = monitored[1]
    table = table_of(rank0["printed"])
    assert (table["sync steps"], table["sync rate"]) == ("4", "33.3 %")
    assert table["sent per replica"] == format_bytes(rank0["sent"][0])
    assert "val_loss" in table and "Communication" not in rank1["printed"]


def test_the_last_row_is_logged_when_everything_is_sent_and_its_parts_add_up(replicas, tmp_path):
    of_weights = ModelCheckpoint(every_n_train_steps=7, save_weights_only=True)
    callbacks = [ModelCheckpoint(every_n_train_steps=5), of_weights]
    options = {"enable_checkpointing": True, "more_callbacks": callbacks}
    rank0, _ = replicas.run(2, fit, str(tmp_path), True, None, None, None, options, timeout=120)
    last = {key: float(value) for key, value in rows(tmp_path)[-1].items()}
    sent, parts = last["curvadion/bytes_sent"], ("in_steps", "in_validation", "in_checkpoints", "at_ends")
    assert sent == rank0["sent"][0] == sum(last[f"curvadion/bytes_{part}"] for part in parts)
    parameters = 4 * sum(parameter.numel() for parameter in Module().parameters())
    # Two validations and a checkpoint of weights send the parameters; two checkpoints also send momenta.
    assert 2 * parameters < last["curvadion/bytes_in_validation"] < 2.1 * parameters
    assert 4 * parameters < last["curvadion/bytes_in_checkpoints"] < 8 * parameters


def test_the_monitor_itself_sends_nothing(replicas, tmp_path, monitored):
    without = replicas.run(2, fit, str(tmp_path), False, {"lag": 0})
    assert [rank["calls"] for rank in monitored[1]] == [rank["calls"] for rank in without]


def test_without_consensus_at_sync_steps_validation_logs_the_drift(replicas, tmp_path):
    replicas.run(2, fit, str(tmp_path), True, {"consensus": "none"})
    drifts = {int(row["step"]): float(row["curvadion/drift"]) for row in rows(tmp_path) if "curvadion/drift" in row}
    assert drifts.keys() == {5, 11} and all(drift > 0 for drift in drifts.values())


def test_under_ddp_it_counts_what_ddp_sends(replicas, tmp_path):
    rank0, _ = replicas.run(2, fit, str(tmp_path), True, "ddp")
    row = [row for row in rows(tmp_path) if "ddp/sync_rate" in row][-1]
    assert float(row["ddp/sync_rate"]) == 1 and float(row["ddp/bytes_saved"]) == 0
    assert float(row["ddp/bytes_sent"]) == 12 * 4 * sum(p.numel() for p in Module().parameters())
    assert table_of(rank0["printed"])["share of DDP"] == "100 %" and "CommunicationMonitor" not in rank0["printed"]
    assert not any(key.startswith("curvadion/") for row in rows(tmp_path) for key in row)


def test_no_key_has_a_space(monitored):
    assert not [key for row in rows(monitored[0]) for key in row if " " in key]


def fit_in_two_parts(rank, world, folder):
    """A fit of 12 steps; the same in two parts of 8 and 4; what each printed on rank 0."""
    whole = fit(rank, world, f"{folder}/whole", True, max_steps=12)
    saving = {"enable_checkpointing": True, "more_callbacks": [ModelCheckpoint(folder, "saved", save_last=False)]}
    first = fit(rank, world, f"{folder}/first", True, max_steps=8, options=saving, val_check_interval=4)
    second = fit(rank, world, f"{folder}/second", True, max_steps=12, ckpt_path=f"{folder}/saved.ckpt")
    return [part["printed"] for part in (whole, first, second)], [part["sent"][0] for part in (first, second)]


def test_after_a_resume_the_table_counts_this_part_and_says_what_the_whole_run_sent(replicas, tmp_path):
    (printed, sent), _ = replicas.run(2, fit_in_two_parts, str(tmp_path), timeout=120)
    whole, first, second = printed
    assert "Communication of this run (" in whole and "Communication of this run (" in first
    assert "whole run" not in whole + first
    assert "Communication of this part of the run, resumed after step 8 (" in second
    table = table_of(second)
    assert (table["optimizer steps"], table["whole run: optimizer steps"]) == ("4", "12")
    assert table["sent per replica"] == format_bytes(sent[1])
    logged = float(rows(tmp_path / "second")[-1]["curvadion/whole_run_bytes_sent"])
    # All but what the first part sent after its checkpoint, two agreements and a comparison of digests.
    assert 0 <= sum(sent) - logged < 500
    assert table["whole run: sent per replica"] == format_bytes(logged)
    gradients = 4 * sum(parameter.numel() for parameter in Module().parameters())
    assert table["whole run: share of DDP"] == format_percent(logged / (12 * gradients))


@pytest.fixture
def _in_this_process(monkeypatch):
    """For a Trainer in this process: leaves no process group and no address behind."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_in_this_process")
@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_the_progress_bar_shows_the_sync_rate_and_the_megabytes_saved(tmp_path, capsys, bar):
    trainer = pl.Trainer(
        accelerator="cpu", strategy="curvadion", devices=1, max_steps=5, logger=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[CommunicationMonitor(), bar(refresh_rate=5)], limit_val_batches=0,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Module())
    assert {"sync_rate", "saved_MB"} <= trainer.progress_bar_metrics.keys()
    shown = capsys.readouterr()
    assert "sync_rate" in shown.out + shown.err and "saved_MB" in shown.out + shown.err


class Embedded(Module):
    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(10_000, 8)


def fit_with_bar(rank, world, folder):
    printed = io.StringIO()
    bar = TQDMProgressBar(refresh_rate=1)
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, strategy=CurvaDionStrategy(), plugins=[Member(rank, world)], logger=False,
        max_steps=120, max_epochs=20, limit_train_batches=6, limit_val_batches=2, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[CommunicationMonitor(), bar], log_every_n_steps=4,
        num_sanity_val_steps=0, default_root_dir=folder,
    )  # fmt: skip
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        trainer.fit(Embedded())
    return printed.getvalue()


def test_advice_stands_on_lines_of_its_own_beside_a_progress_bar(replicas, tmp_path):
    printed, _ = replicas.run(2, fit_with_bar, str(tmp_path), timeout=120)
    advice = [line for line in re.split(r"[\r\n]", printed) if "CommunicationMonitor: " in line]
    assert "Epoch 19" in printed
    assert len(advice) == 2 and all(line.startswith("CommunicationMonitor: ") for line in advice)
    assert "The embedding 'words'" in advice[0] and "The consensus before validations" in advice[1]


def test_advice_comes_once_from_rank_0_and_again_under_the_table(replicas, tmp_path):
    often = {
        "max_steps": 120,
        "max_epochs": 20,
        "val_check_interval": 1.0,
        "limit_train_batches": 6,
        "limit_val_batches": 2,
    }
    rank0, rank1 = replicas.run(2, fit, str(tmp_path), True, {}, EveryNSteps(50), None, often, timeout=120)
    meanwhile, _, below = rank0["printed"].partition("Communication of this run")
    for printed in (meanwhile, below.partition("time of training")[2]):
        assert printed.count("The consensus before validations and checkpoints sent") == 1
        assert "val_check_interval" in printed
    assert rank1["printed"] == ""


def fit_with_own_metric(rank, world, folder):
    names_defined_in("A metric")
    try:
        return fit(rank, world, folder, True)["printed"]
    finally:
        del METRICS["longest_gap"]


def test_the_guides_metric_is_logged_and_has_its_row(replicas, tmp_path):
    printed, _ = replicas.run(2, fit_with_own_metric, str(tmp_path))
    assert table_of(printed)["longest run of local steps"] == "2"
    # The report's process knows no such metric.
    assert read_run(tmp_path).table["longest gap"] == "2"
