"""Validation, test, predict, and what ends or shortens a fit."""

import time
from datetime import timedelta

from lightning.pytorch.callbacks import Timer
from training import Module, tokens_loader

from .registry import feature

VALIDATION = {
    "validation within an epoch": {"val_check_interval": 4},
    "validation between epochs": {"max_steps": -1, "max_epochs": 2, "limit_train_batches": 4},
    "sanity check": {"num_sanity_val_steps": 2},
    "`limit_*`": {"max_steps": -1, "max_epochs": 2, "limit_train_batches": 0.25, "limit_val_batches": 2},
}


@feature("loops", *VALIDATION)
def validation_logs_its_loss(run):
    trainer = run.fit(**VALIDATION[run.name])
    assert "val_loss" in trainer.callback_metrics or run.name == "sanity check"


@feature("loops", "test")
def test_logs_its_loss(run):
    trainer = run.fit()
    (result,) = trainer.test(run.modules[0], tokens_loader(1), verbose=False)
    assert result["test_loss"] > 0


@feature("loops", "predict")
def predict_returns_a_prediction_for_every_batch(run):
    trainer = run.fit()
    predictions = trainer.predict(run.modules[0], tokens_loader(1))
    # Of 24 batches of 8 tokens, half are this rank's.
    assert [prediction.shape for prediction in predictions] == [(8, 11)] * 12


LENGTHS = {
    "`fast_dev_run`": ({"fast_dev_run": 3, "max_steps": -1}, 3),
    "`overfit_batches`": ({"overfit_batches": 2, "max_steps": -1, "max_epochs": 3}, 6),
    "`max_steps`": ({"max_steps": 7}, 7),
}


@feature("loops", *LENGTHS)
def fit_takes_as_many_steps_as_the_flag_says(run):
    options, steps = LENGTHS[run.name]
    assert run.fit(**options).global_step == steps


@feature("loops", "several epochs, shuffled")
def every_epoch_has_its_own_order(run):
    trainer = run.fit(max_steps=-1, max_epochs=3, limit_train_batches=4)
    batches = run.modules[0].batches
    assert trainer.global_step == 12 and batches[:4] != batches[4:8]


class SlowModule(Module):
    def training_step(self, batch, batch_idx):
        time.sleep(0.01 * (1 + self.trainer.global_rank))
        return super().training_step(batch, batch_idx)


@feature("loops", "`max_time`")
def all_ranks_stop_when_the_time_is_over(run):
    timer = Timer(timedelta(seconds=0.3))
    trainer = run.fit(SlowModule(), max_steps=10_000, max_epochs=-1, callbacks=[timer])
    assert 0 < trainer.global_step < 100
    # The number of steps depends on the clock, so the strategies may differ in it.
    run.trainers.clear()


class ReloadingModule(Module):
    loaded = 0

    def train_dataloader(self):
        self.loaded += 1
        return tokens_loader(self.loaded)


@feature("loops", "`reload_dataloaders_every_n_epochs`")
def every_epoch_loads_its_data_again(run):
    module = ReloadingModule()
    run.fit(module, max_steps=-1, max_epochs=3, limit_train_batches=2, reload_dataloaders_every_n_epochs=1)
    assert module.loaded == 3
