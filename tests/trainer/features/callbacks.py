"""Callbacks of Lightning."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import (
    Checkpoint,
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from training import Module, same

from .registry import feature

CHECKPOINTS = {
    "`ModelCheckpoint`: top-k": {"filename": "{epoch}", "monitor": "val_loss", "save_top_k": 2},
    "`ModelCheckpoint`: every n steps, `save_last`": {
        "filename": "{step}",
        "every_n_train_steps": 5,
        "save_top_k": -1,
        "save_last": True,
    },
}


@feature("callbacks", *CHECKPOINTS)
def a_checkpoint_holds_the_whole_model(run):
    callback = ModelCheckpoint(run.folder, **CHECKPOINTS[run.name])
    run.fit(callbacks=[callback], enable_checkpointing=True, max_steps=-1, max_epochs=3, limit_train_batches=4)
    # Rank 0 may still write.
    torch.distributed.barrier()
    assert len(list(run.folder.glob("*.ckpt"))) >= 2 and not list(run.folder.glob(".*"))
    best = callback.best_model_path or callback.last_model_path
    loaded = torch.load(best, weights_only=True)
    assert set(loaded["state_dict"]) == set(run.modules[0].state_dict())


class DisagreeingModule(Module):
    """The metric falls on rank 0 and rises on the others; its mean rises."""

    def validation_step(self, batch, batch_idx):
        epoch = self.trainer.current_epoch
        self.log("val_loss", float(-epoch if self.trainer.global_rank == 0 else 2 * epoch), sync_dist=True)


@feature("callbacks", "`EarlyStopping`")
def all_ranks_stop_early_together(run):
    stop = EarlyStopping("val_loss", patience=1)
    trainer = run.fit(DisagreeingModule(), callbacks=[stop], max_steps=-1, max_epochs=10, limit_train_batches=2)
    assert trainer.current_epoch < 4


class SavedWeights(Checkpoint):
    """What this rank would write. A ``Checkpoint``, so as to come after the callbacks that change it."""

    def on_save_checkpoint(self, trainer, module, checkpoint):
        self.weights = [tensor.clone() for tensor in checkpoint["state_dict"].values()]


AVERAGES = {
    # Not in the oldest supported Lightning.
    "`WeightAveraging` (EMA)": lambda: pl.callbacks.EMAWeightAveraging(decay=0.8),
    "`StochasticWeightAveraging`": lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1),
}


@feature("callbacks", *AVERAGES)
def all_ranks_would_save_the_same_average(run):
    checkpoint, saved = ModelCheckpoint(run.folder, "last", every_n_epochs=1), SavedWeights()
    run.fit(
        callbacks=[AVERAGES[run.name](), checkpoint, saved],
        enable_checkpointing=True,
        max_steps=-1,
        max_epochs=4,
        limit_train_batches=3,
    )
    weights = [None] * run.world
    torch.distributed.all_gather_object(weights, saved.weights)
    assert same(*weights) or not run.under_curvadion


MONITORS = {
    "`LearningRateMonitor`": (lambda: LearningRateMonitor("step"), "lr-CurvaDion"),
    "`DeviceStatsMonitor`": (lambda: DeviceStatsMonitor(cpu_stats=True), "cpu_percent"),
}


@feature("callbacks", *MONITORS)
def a_monitor_logs(run):
    create, key = MONITORS[run.name]
    run.fit(callbacks=[create()], logger=CSVLogger(run.folder), log_every_n_steps=2)
    if run.rank == 0:
        (metrics,) = run.folder.rglob("metrics.csv")
        assert key in metrics.read_text()


@feature("callbacks", "`ModelSummary`")
def the_model_is_summarised(run):
    run.fit(callbacks=[ModelSummary(max_depth=2)], logger=CSVLogger(run.folder), log_every_n_steps=2)
