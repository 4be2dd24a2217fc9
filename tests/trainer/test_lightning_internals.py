"""The private names of Lightning that we use are where we look for them, in the version that is installed."""

import signal
import sys

import lightning
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from packaging.version import Version

from lightning_curvadion.trainer import lightning_internals as internals

NEWER = pytest.mark.skipif(Version(lightning.__version__) < Version("2.6"), reason="Lightning 2.5 has no such thing")


class Probe(Callback):
    """Runs a function in the middle of training."""

    def __init__(self, function):
        self.function = function

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.function(trainer, pl_module)


def fit(function, steps=4, **options):
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Probe(function), *options.pop("callbacks", [])],
        **options,
    )
    trainer.fit(BoringModel())
    return trainer


def test_a_name_is_looked_up_before_any_entry_point_is_loaded(tmp_path, monkeypatch):
    # An entry point could otherwise register ours, and nobody would have to import the package.
    distribution = tmp_path / "own_factory-1.0.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: own-factory\nVersion: 1.0\n")
    (distribution / "entry_points.txt").write_text("[lightning.pytorch.callbacks_factory]\nown = own_factory:make\n")
    (tmp_path / "own_factory.py").write_text("def make():\n    return []\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="invalid strategy name"):
        pl.Trainer(accelerator="cpu", strategy="a_name_of_ours", logger=False)
    assert "own_factory" not in sys.modules
    pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert "own_factory" in sys.modules, "the first Trainer that has found its strategy loads it"


def test_both_handlers_are_replaced_and_a_users_own_stays():
    received = []
    before = signal.signal(signal.SIGTERM, lambda signum, _: received.append("user"))

    def replace_and_raise(trainer, _):
        if not received:
            replaced = internals.replace_signal_handlers(
                trainer, lambda signum, _: received.append("sigterm"), lambda signum, _: received.append("requeue")
            )
            assert replaced
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGUSR1)
            assert not trainer.received_sigterm

    try:
        fit(replace_and_raise, plugins=[SLURMEnvironment(auto_requeue=True)])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == ["sigterm", "user", "requeue"]


def test_a_requeue_saves_a_checkpoint_and_calls_scontrol(monkeypatch, tmp_path):
    calls = tmp_path / "calls"
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $@ >> {calls}\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "7")

    def requeue(trainer, _):
        if trainer.global_step == 2:
            internals.requeue_job(trainer, signal.SIGUSR1)

    fit(requeue, default_root_dir=tmp_path)
    assert calls.read_text() == "requeue 7\n"
    assert torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == 2


def test_a_stop_ends_training_after_the_batch():
    stopped_at = []

    def stop(trainer, _):
        if trainer.global_step == 2:
            internals.stop_after_batch(trainer)
            stopped_at.append(trainer.global_step)

    with pytest.raises(SIGTERMException):
        fit(stop)
    assert stopped_at == [2]


@NEWER
def test_the_broadcast_before_every_batch_is_dropped():
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    loop = trainer.fit_loop.epoch_loop
    original = loop._broadcast_sigterm_tensor
    assert callable(original)
    internals.disable_sigterm_broadcast(trainer)
    assert loop._broadcast_sigterm_tensor is not original and loop._broadcast_sigterm_tensor() is None


def test_moving_averages_are_found():
    swa = StochasticWeightAveraging(0.01, swa_epoch_start=1)
    assert internals.averaged_model(swa) is None and internals.averaged_model(Callback()) is None
    fit(lambda *_: None, steps=-1, max_epochs=3, limit_train_batches=2, callbacks=[swa])
    assert set(internals.averaged_model(swa).state_dict()) == {"layer.weight", "layer.bias"}


@NEWER
def test_an_exponential_moving_average_is_found():
    average = pl.callbacks.EMAWeightAveraging(decay=0.5)
    found = []
    fit(lambda *_: found.append(internals.averaged_model(average)), callbacks=[average])
    assert all(isinstance(model, torch.nn.Module) for model in found) and found


def test_the_trainer_of_a_module_is_found_and_forgotten():
    module = BoringModel()
    assert internals.trainer_of(None) is None and internals.trainer_of(module) is None
    trainer = module.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert internals.trainer_of(module) is trainer
    internals.detach_trainer(module)
    with pytest.raises(RuntimeError, match="not attached"):
        _ = module.trainer


def test_steps_are_counted_and_logging_steps_known():
    seen = []
    fit(
        lambda trainer, _: seen.append((internals.optimizer_steps(trainer), internals.is_logging_step(trainer))),
        steps=3,
        accumulate_grad_batches=2,
        log_every_n_steps=2,
    )
    assert [steps for steps, _ in seen] == [0, 0, 1, 1, 2, 2]
    # It counts from the end of a batch on, so that this is within the second step.
    assert {steps for steps, logs in seen if logs} == {1}


def test_configure_optimizers_is_read_in_any_form():
    module = BoringModel()
    module.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    (optimizer,) = internals.configured_optimizers(module)
    assert isinstance(optimizer, torch.optim.SGD)


def test_a_device_mesh_is_the_modules_and_a_module_without_memory_gets_some():
    with torch.device("meta"):
        module = BoringModel()
    # Any object: the module looks at none of it.
    internals.give_device_mesh(module, mesh := object())
    assert module.device_mesh is mesh
    internals.materialize_shards(module, torch.device("cpu"))
    assert torch.isfinite(module.layer.weight).all() and module.layer.weight.device.type == "cpu"
