"""CommunicationMonitor and the metrics behind it, on real replicas."""

import csv
import math
import os
import re
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from models import build, train_step
from replicas import counted_collectives
from torch import nn
from training import Module, trainer_for

from lightning_curvadion import (
    CommunicationMonitor,
    CurvaDion,
    CurvaDionStrategy,
    EveryNSteps,
    ProcessGroupSync,
    split_parameters,
)
from lightning_curvadion.trainer import metrics
from lightning_curvadion.trainer.advice import RunSoFar, advice_on_model, advice_on_run


def fit(rank, world, folder, with_monitor, strategy=None, trigger=None, **options):
    """A fit with its log as rank 0 wrote it, its collectives and what was said."""
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
    said = [str(w.message) for w in caught if "CommunicationMonitor" in str(w.message)]
    return {
        "calls": list(calls),
        "sent": sent,
        "said": said,
        "summary": monitor.summary(trainer) if with_monitor else "",
    }


def rows(folder):
    with open(folder / "metrics.csv") as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_it_logs_at_the_trainers_interval_and_every_sync_step_once(replicas, tmp_path):
    rank0, _ = replicas.run(2, fit, str(tmp_path), True, timeout=120)
    logged = rows(tmp_path)
    at_interval = [row for row in logged if "curvadion/sync_rate" in row]
    assert [int(row["step"]) for row in at_interval] == [3, 7, 11]
    expected = {"rmmc", "sync_rate", "steps_since_sync", "bytes_sent", "bytes_saved", "seconds", "rmmc_group/matrices"}
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
    table = dict(re.findall(r"^  (\S.*?)  +(\S.*)$", rank0["summary"], flags=re.M))
    assert table["sync steps"] == "4 (33.3 %)" and table["sent per replica"] == f"{rank0['sent'] / 1e6:.2f} MB"


def test_it_sends_nothing(replicas, tmp_path):
    with_it = replicas.run(2, fit, str(tmp_path / "a"), True)
    without = replicas.run(2, fit, str(tmp_path / "b"), False)
    assert [rank["calls"] for rank in with_it] == [rank["calls"] for rank in without]


def test_where_the_kind_of_consensus_hides_the_drift_validation_shows_it(replicas, tmp_path):
    replicas.run(2, fit, str(tmp_path), True, {"consensus": "none"})
    drifts = {int(row["step"]): float(row["curvadion/drift"]) for row in rows(tmp_path) if "curvadion/drift" in row}
    assert drifts.keys() == {5, 11} and all(drift > 0 for drift in drifts.values())


def test_under_ddp_it_counts_what_ddp_sends(replicas, tmp_path):
    rank0, _ = replicas.run(2, fit, str(tmp_path), True, "ddp")
    row = [row for row in rows(tmp_path) if "curvadion/sync_rate" in row][-1]
    assert float(row["curvadion/sync_rate"]) == 1 and float(row["curvadion/bytes_saved"]) == 0
    assert float(row["curvadion/bytes_sent"]) == 12 * 4 * sum(p.numel() for p in Module().parameters())
    assert "100.00 % of DDP" in rank0["summary"] and not rank0["said"]


class Settled(ProcessGroupSync):
    """Measures by itself how far parameters move when they meet."""

    def mean_right(self, optimizer, factors, whole):
        own = [parameter.detach().clone() for _, parameter in optimizer.named_parameters()]
        means = super().mean_right(optimizer, factors, whole)
        met = [parameter.detach() for _, parameter in optimizer.named_parameters()]
        apart = sum((a - b).double().square().sum() for a, b in zip(own, met, strict=True))
        self.true = (apart / sum(b.double().square().sum() for b in met)).sqrt().item()
        return means


def drifts(rank, world, settings):
    torch.manual_seed(0)
    model, optimizer = build(trigger=EveryNSteps(2))
    sync = Settled(**settings)
    optimizer.register_sync_hook(sync)
    sync.measure_drift()
    told, true = [], []
    for step in range(4):
        train_step(model, optimizer, step, rank)
        told.append(sync.drift)
        if optimizer.last_step.synced:
            true.append(sync.true)
    return told, true


@pytest.mark.parametrize("settings", [{}, {"momentum": "local", "wire_format": "int2", "chunk": 1000}])
def test_drift_is_the_distance_to_the_consensus(replicas, settings):
    for told, true in replicas.run(2, drifts, settings):
        assert told[0] is None and told[2] is None
        assert [told[1], told[3]] == pytest.approx(true, rel=1e-4) and min(true) > 0


@pytest.fixture
def _alone(monkeypatch):
    """For a Trainer in this process: leaves no process group and no address behind."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_the_progress_bar_shows_the_sync_rate_and_what_is_saved(tmp_path, capsys, bar):
    trainer = pl.Trainer(
        accelerator="cpu", strategy="curvadion", devices=1, max_steps=3, logger=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[CommunicationMonitor(), bar(refresh_rate=1)], limit_val_batches=0,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Module())
    assert {"sync_rate", "saved_MB"} <= trainer.progress_bar_metrics.keys()
    shown = capsys.readouterr()
    assert "sync_rate" in shown.out + shown.err and "saved_MB" in shown.out + shown.err


# -- advice -----------------------------------------------------------------------------------------------------------


def keys(**changes):
    healthy = {"steps": 400, "sync_steps": 80, "step_bytes": 8000, "consensus_bytes": 1000, "drifts": [0.03] * 80}
    return [key for key, _ in advice_on_run(RunSoFar(**{**healthy, **changes}))]


def test_a_healthy_run_hears_nothing_and_each_fault_is_named():
    assert keys() == []
    assert keys(sync_steps=390) == ["often"]
    assert keys(sync_steps=1, drifts=[]) == ["never"]
    assert keys(consensus_bytes=9000) == ["consensus"]
    assert keys(drifts=[0.02 + 0.01 * n for n in range(40)]) == ["drift"]
    assert keys(steps=50, sync_steps=50) == []


def test_a_large_embedding_is_named():
    large = nn.ModuleDict({"words": nn.Embedding(1000, 8), "rest": nn.Linear(8, 8)})
    ((_, sentence),) = advice_on_model(large)
    assert "'words' holds 99 %" in sentence
    large["words"].weight.requires_grad_(False)
    assert list(advice_on_model(large)) == []


def talkative(rank, world, folder, options):
    return fit(rank, world, folder, True, {}, EveryNSteps(50), **options)["said"]


def test_a_warning_comes_once_from_rank_0_and_in_plain_words(replicas, tmp_path):
    often = {"max_steps": 120, "max_epochs": 20, "val_check_interval": 1.0, "limit_train_batches": 6}
    said, silent = replicas.run(2, talkative, str(tmp_path), often, timeout=120)
    assert len(said) == 1 and not silent
    assert "The consensus before validations and checkpoints sent" in said[0] and "val_check_interval" in said[0]


# -- metrics ----------------------------------------------------------------------------------------------------------


def alone(rank, world):
    """The metrics in a loop without Lightning, reduced over the ranks by torchmetrics."""
    model, optimizer = build(hook={}, trigger=EveryNSteps(3))
    rate, since, sent, drift = metrics.SyncRate(), metrics.StepsSinceSync(), metrics.BytesSent(), metrics.Drift()
    optimizer.sync_hook.measure_drift()
    total = 0
    for step in range(8):
        train_step(model, optimizer, step, rank)
        rate.update(optimizer.last_step.synced)
        since.update(optimizer.last_step.synced)
        sent.update(optimizer.last_step.bytes_sent)
        drift.update(optimizer.sync_hook.drift)
        total += optimizer.last_step.bytes_sent
    return total, [metric.compute().item() for metric in (rate, since, sent, drift)]


def test_metrics_alone_reduce_over_ranks(replicas):
    (total, ours), (other, theirs) = replicas.run(2, alone)
    assert ours == theirs and ours[:3] == [0.25, 2, total + other] and ours[3] > 0


def test_bytes_are_exact_beyond_float32():
    sent, saved = metrics.BytesSent(), metrics.BytesSaved()
    for _ in range(2):
        sent.update(2**40 + 1)
        saved.update(1, ddp=2**40)
    assert sent.compute().item() == 2**41 + 2 and saved.compute().item() == 2**41 - 2


def test_rmmc_leaves_first_steps_out():
    rmmc = metrics.RMMC(["a"])
    rmmc.update(math.inf, {"a": math.inf})
    rmmc.update(0.5, {"a": 0.25, "unknown": 9.0})
    assert {name: value.item() for name, value in rmmc.compute().items()} == {"max": 0.5, "a": 0.25}


def test_rmmc_by_parameter_is_what_the_step_agreed_on():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    optimizer = CurvaDion(split_parameters(model))
    assert optimizer.rmmc_by_parameter() == {}
    norms = []
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(4, 6, generator=generator)).square().mean().backward()
        momenta = [optimizer.state[p].get("momentum", torch.zeros_like(p)) for p in (model[0].weight, model[1].weight)]
        pairs = zip(momenta, (model[0].weight, model[1].weight), strict=True)
        norms.append([(m + p.grad).norm().item() for m, p in pairs])
        optimizer.step()
    changes = [abs(now - before) / before for before, now in zip(*norms, strict=True)]
    told = optimizer.rmmc_by_parameter()
    assert list(told) == ["0.weight", "1.weight"] and list(told.values()) == pytest.approx(changes, rel=1e-4)
    assert optimizer.last_step.rmmc == pytest.approx(max(changes), rel=1e-4)
