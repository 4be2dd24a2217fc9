"""Fast and slow replicas under a Trainer: they take different numbers of steps, and meet at the ends of epochs."""

import time

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from models import Net
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training import fingerprint, trainer_for

from lightning_curvadion import CurvaDion, CurvaDionStrategy, EveryNSteps, split_parameters
from lightning_curvadion.trainer.paced_loop import ClaimingSampler


class Paced(pl.LightningModule):
    """Says which samples it trains on, and takes a while for each batch."""

    def __init__(self, seconds, logs=False):
        super().__init__()
        self.net, self.seconds, self.logs = Net(), seconds, logs
        self.samples, self.rates, self.validated = [], [], []

    def loss_of(self, samples):
        return nn.functional.cross_entropy(self.net(samples % 11), (3 * samples + 1) % 11)

    def training_step(self, batch, batch_idx):
        time.sleep(self.seconds)
        self.samples.append((self.current_epoch, batch[0].tolist()))
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.rates.append((self.trainer.strategy.sync.global_step, rate))
        loss = self.loss_of(batch[0])
        if self.logs:
            self.log("loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss_of(batch[0]), sync_dist=True)

    def on_validation_end(self):
        self.validated.append((fingerprint(self.net.parameters()), self.trainer.strategy.sync.global_step))

    def configure_optimizers(self):
        optimizer = CurvaDion(split_parameters(self), lr=0.02, trigger=EveryNSteps(3))
        schedulers = [
            {"scheduler": torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=100), "interval": "step"},
            {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=1.0), "interval": "epoch"},
        ]
        return [optimizer], schedulers


def fit(rank, world, seconds, folder, logs=False, **options):
    torch.set_num_threads(1)
    module = Paced(seconds[rank], logs)
    loader = DataLoader(TensorDataset(torch.arange(240)), batch_size=4, shuffle=True, drop_last=True)
    val = DataLoader(TensorDataset(torch.arange(22)), batch_size=4)
    options = {
        "max_steps": -1,
        "max_epochs": 2,
        "num_sanity_val_steps": 0,
        "callbacks": ModelCheckpoint(folder, save_top_k=-1),
        **options,
    }
    trainer = trainer_for(
        rank,
        world,
        CurvaDionStrategy(heterogeneous=True),
        enable_checkpointing=True,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, loader, val)
    epochs = [scheduler["scheduler"].last_epoch for scheduler in map(vars, trainer.lr_scheduler_configs)]
    loss = float(trainer.callback_metrics["val_loss"])
    steps, saved = trainer.global_step, trainer.checkpoint_callback.best_model_path
    return {
        "steps": steps, "samples": module.samples, "rates": module.rates, "validated": module.validated,
        "loss": loss, "parameters": fingerprint(module.parameters()), "epochs": epochs, "saved": saved,
    }  # fmt: skip


def test_a_fast_replica_takes_more_steps_and_all_meet_at_the_ends_of_epochs(replicas, tmp_path):
    fast, slow = replicas.run(2, fit, (0.02, 0.1), str(tmp_path), timeout=120)
    # Two epochs of 60 batches for two.
    assert fast["steps"] > 2 * slow["steps"] and 115 <= fast["steps"] + slow["steps"] <= 150
    assert fast["validated"] == slow["validated"] and len(fast["validated"]) == 2
    assert fast["parameters"] == slow["parameters"] and fast["loss"] == slow["loss"] < 0.5
    for epoch in (0, 1):
        drawn = [n for one in (fast, slow) for number, batch in one["samples"] if number == epoch for n in batch]
        # A replica that has not heard that the epoch is over goes on with others.
        assert len(set(drawn)) >= 0.8 * len(drawn)
    for one in (fast, slow):
        for progress, rate in one["rates"]:
            assert rate == pytest.approx(0.02 * (1 - 0.9 * min(1, int(progress) / 100)))
        assert one["epochs"][1] == 2
    assert torch.load(fast["saved"], weights_only=True)["epoch"] == 1


def refused(rank, world, message, folder, options):
    with pytest.raises(MisconfigurationException, match=message):
        fit(rank, world, (0, 0), folder, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 10}, "max_epochs instead of max_steps"),
        ({"val_check_interval": 5}, "no val_check_interval"),
        ({"logs": True}, "the reduction of a metric would meet no other within an epoch"),
        ({"callbacks": ModelCheckpoint(every_n_train_steps=5)}, "every_n_epochs"),
    ],
)
def test_what_happens_after_so_many_steps_of_a_replica_is_one_clear_error(replicas, tmp_path, options, message):
    replicas.run(2, refused, message, str(tmp_path), options, timeout=60)


def test_elastic_replicas_take_the_same_steps():
    with pytest.raises(MisconfigurationException, match="leave out heterogeneous"):
        CurvaDionStrategy(elastic=True, heterogeneous=True)


def test_an_epoch_is_claimed_whole_and_then_the_next_one():
    claimed = {}

    def claim(name, amount):
        claimed[name] = claimed.get(name, 0) + amount
        return claimed[name]

    fast, slow = (ClaimingSampler(range(20), 4, seed=0, replicas=2, claim=claim) for _ in range(2))
    assert len(fast) == 10
    draw_fast, draw_slow = iter(fast), iter(slow)
    drawn = [next(draw_slow if number % 4 == 3 else draw_fast) for number in range(16)]
    drawn += [next(draw_slow) for _ in range(4)]
    assert len(drawn) == len(set(drawn)) == 20
    # All are claimed, and the next order begins.
    assert next(draw_fast) in range(20)
    fast.set_epoch(1)
    assert [next(iter(fast))] == [next(iter(ClaimingSampler(range(20), 4, 1, 1, lambda *_: 4)))]
