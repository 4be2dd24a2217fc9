"""``CommunicationMonitor`` on real replicas: what it logs, prints and warns of."""

import csv
import os
import re
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from replicas import counted_collectives
from training import Module, trainer_for

from lightning_curvadion import CommunicationMonitor, CurvaDionStrategy, EveryNSteps


def fit(rank, world, folder, with_monitor, strategy=None, trigger=None, **options):
    """A fit that rank 0 logs in the folder: its collectives, warnings and table."""
    pl.seed_everything(0, verbose=False)
    module = Module(trigger=trigger or EveryNSteps(3))
    monitor = CommunicationMonitor()
    with counted_collectives() as calls, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = trainer_for(
            rank,
            world,
            CurvaDionStrategy(**(strategy or {})) if strategy != "ddp" else "ddp",
            callbacks=[monitor] if with_monitor else [],
            logger=CSVLogger(folder, name="", version=""),
            log_every_n_steps=4,
            num_sanity_val_steps=0,
            **{"max_steps": 12, "val_check_interval": 6, **options},
        )
        trainer.fit(module)
        sent = trainer.strategy.sync.bytes_sent if strategy != "ddp" else None
    own_calls = calls.of("lightning_curvadion.sync.collectives")
    counted = sum(size for _, size in own_calls)
    monitor_warnings = [str(w.message) for w in caught if "CommunicationMonitor" in str(w.message)]
    return {
        "calls": list(calls),
        "sent": (sent, int(monitor.bytes_sent.sent), counted),
        "warnings": monitor_warnings,
        "summary": monitor.summary(trainer) if with_monitor else "",
    }


def rows(folder):
    with open(folder / "metrics.csv") as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def monitored(replicas, tmp_path_factory):
    """The folder of a fit with the monitor, and what each rank returned."""
    folder = tmp_path_factory.mktemp("monitored")
    return folder, replicas.run(2, fit, str(folder), True, timeout=120)


def test_it_logs_at_the_trainers_interval_and_every_sync_step_once(monitored):
    logged = rows(monitored[0])
    at_interval = [row for row in logged if "curvadion/sync_rate" in row]
    assert [int(row["step"]) for row in at_interval] == [3, 7, 11]
    expected = {"rmmc", "sync_rate", "steps_since_sync", "bytes_sent", "bytes_saved", "seconds", "rmmc_group/matrices"}
    expected |= {"rmmc_group/first moments", "rmmc_layer/first moments"}
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
    rank0, _ = monitored[1]
    table = dict(re.findall(r"^  (\S.*?)  +(\S.*)$", rank0["summary"], flags=re.M))
    assert table["sync steps"] == "4 (33.3 %)" and table["sent per replica"] == f"{rank0['sent'][0] / 1e6:.2f} MB"
    assert "val_loss" in table


def test_the_monitor_itself_sends_nothing(replicas, tmp_path, monitored):
    without = replicas.run(2, fit, str(tmp_path), False)
    assert [rank["calls"] for rank in monitored[1]] == [rank["calls"] for rank in without]


def test_without_consensus_at_sync_steps_validation_logs_the_drift(replicas, tmp_path):
    replicas.run(2, fit, str(tmp_path), True, {"consensus": "none"})
    drifts = {int(row["step"]): float(row["curvadion/drift"]) for row in rows(tmp_path) if "curvadion/drift" in row}
    assert drifts.keys() == {5, 11} and all(drift > 0 for drift in drifts.values())


def test_under_ddp_it_counts_what_ddp_sends(replicas, tmp_path):
    rank0, _ = replicas.run(2, fit, str(tmp_path), True, "ddp")
    row = [row for row in rows(tmp_path) if "curvadion/sync_rate" in row][-1]
    assert float(row["curvadion/sync_rate"]) == 1 and float(row["curvadion/bytes_saved"]) == 0
    assert float(row["curvadion/bytes_sent"]) == 12 * 4 * sum(p.numel() for p in Module().parameters())
    assert "100.00 % of DDP" in rank0["summary"] and not rank0["warnings"]


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


def warnings_of(rank, world, folder, options):
    return fit(rank, world, folder, True, {}, EveryNSteps(50), **options)["warnings"]


def test_a_warning_comes_once_and_from_rank_0(replicas, tmp_path):
    often = {
        "max_steps": 120,
        "max_epochs": 20,
        "val_check_interval": 1.0,
        "limit_train_batches": 6,
        "limit_val_batches": 2,
    }
    rank0, rank1 = replicas.run(2, warnings_of, str(tmp_path), often, timeout=120)
    assert len(rank0) == 1 and not rank1
    assert "The consensus before validations and checkpoints sent" in rank0[0] and "val_check_interval" in rank0[0]
