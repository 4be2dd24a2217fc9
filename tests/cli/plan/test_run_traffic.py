"""The bytes of validations and checkpoints that are planned, and those that replicas send."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from training import Module, trainer_for

from lightning_curvadion import CommunicationMonitor, CurvaDionStrategy, EveryNSteps
from lightning_curvadion.cli.plan.run_traffic import measure_consensus
from lightning_curvadion.cli.plan.schedule import read_schedule

TRAINER = {"max_steps": 12, "max_epochs": 1, "limit_train_batches": 12}
CASES = {
    "validations, then checkpoints": (2, {"val_check_interval": 4}, {}),
    "checkpoints between validations": (2, {"val_check_interval": 6}, {"every_n_train_steps": 5}),
    "no validation": (2, {"limit_val_batches": 0}, {"save_on_train_epoch_end": True}),
    "no checkpoint": (2, {"val_check_interval": 5}, None),
    "three epochs, three replicas": (3, {"limit_train_batches": 4, "max_epochs": 3, "limit_val_batches": 0}, None),
}


def sent_by_cause(rank, world, folder, options, checkpoint):
    pl.seed_everything(0, verbose=False)
    monitor = CommunicationMonitor()
    callbacks = [monitor] if checkpoint is None else [monitor, ModelCheckpoint(folder, **checkpoint)]
    trainer = trainer_for(
        rank, world, callbacks=callbacks, num_sanity_val_steps=0, enable_checkpointing=checkpoint is not None,
        **{**TRAINER, **options},
    )  # fmt: skip
    # The last of 12 steps is a local one: a sync step would have averaged the buffers that the end sends.
    trainer.fit(Module(trigger=EveryNSteps(5)))
    return monitor.bytes_sent.by_cause


@pytest.mark.parametrize("case", CASES)
def test_a_plan_has_the_bytes_that_replicas_send(replicas, tmp_path, case):
    world, options, checkpoint = CASES[case]
    sent, *_ = replicas.run(world, sent_by_cause, str(tmp_path), options, checkpoint)
    callbacks = [] if checkpoint is None else [{"class_path": "ModelCheckpoint", "init_args": checkpoint}]
    config = {**TRAINER, **options, "callbacks": callbacks, "enable_checkpointing": checkpoint is not None}
    with torch.device("meta"):
        module = Module()
    settings = CurvaDionStrategy().sync.settings
    planned = measure_consensus(module, module.configure_optimizers(), settings, world).of_run(read_schedule(config))
    assert planned["validation"] == pytest.approx(sent.get("validation", 0), rel=0.02)
    assert planned["checkpoints"] == pytest.approx(sent.get("checkpoints", 0), rel=0.02)
    assert planned["start and end"] == sent["ends"]
