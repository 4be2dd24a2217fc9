"""``Tuner.lr_find`` finds a learning rate for CurvaDion that serves as well as the one it finds for AdamW."""

from functools import partial
from statistics import median

import lightning.pytorch as pl
import pytest
import torch
from classifiers import BATCH, CLASSIFIERS, NOISE, TRAIN, adamw, curvadion, load_digits, trained
from lightning.pytorch.tuner import Tuner
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

OPTIMIZERS = (adamw, curvadion)
SEEDS = (0, 1, 2)


class Classifier(pl.LightningModule):
    def __init__(self, net, optimizer):
        super().__init__()
        self.net, self.optimizer, self.lr = net, optimizer, 1.0

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.net(images + NOISE * torch.randn_like(images)), labels)

    def configure_optimizers(self):
        return self.optimizer(self, self.lr)


def suggestion(optimizer, seed, model, images, labels, folder):
    torch.manual_seed(seed)
    module = Classifier(model(), optimizer)
    batches = DataLoader(TensorDataset(images[:TRAIN], labels[:TRAIN]), BATCH, shuffle=True)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=-1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=folder,
    )  # fmt: skip
    return Tuner(trainer).lr_find(module, batches, min_lr=1e-3, max_lr=0.3, num_training=200).suggestion()


@pytest.mark.parametrize("model", CLASSIFIERS.values(), ids=CLASSIFIERS)
def test_the_rate_it_finds_ends_no_higher_than_adamw_at_the_rate_it_finds_for_adamw(model, tmp_path, replicas):
    digits = load_digits()
    jobs = [(optimizer, seed, model, *digits, tmp_path) for optimizer in OPTIMIZERS for seed in SEEDS]
    suggestions = replicas.map(suggestion, jobs)
    # The middle one of three.
    found = [median(suggestions[:3]), median(suggestions[3:])]
    rates = [partial(optimizer, lr=lr) for optimizer, lr in zip(OPTIMIZERS, found, strict=True)]
    of_adamw, ours = trained(model, rates, digits, replicas)
    print(f"\nAdamW: {of_adamw:.3f} at {found[0]:.4f}; CurvaDion: {ours:.3f} at {found[1]:.4f}")
    assert ours < 1.02 * of_adamw
