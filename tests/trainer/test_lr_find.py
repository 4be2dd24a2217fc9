"""``Tuner.lr_find`` finds a learning rate for CurvaDion that serves as well as the one it finds for AdamW."""

from statistics import median

import lightning.pytorch as pl
import pytest
import torch
from classifiers import BATCH, CLASSIFIERS, NOISE, TRAIN, load_digits, trained
from lightning.pytorch.tuner import Tuner
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvadion import CurvaDion, split_parameters


def adamw(module, lr):
    return torch.optim.AdamW(module.parameters(), lr=lr)


def curvadion(module, lr):
    return CurvaDion(split_parameters(module), lr=lr, lr_scale="match_rms_adamw")


class Classifier(pl.LightningModule):
    def __init__(self, net, optimizer):
        super().__init__()
        self.net, self.optimizer, self.lr = net, optimizer, 1.0

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.net(images + NOISE * torch.randn_like(images)), labels)

    def configure_optimizers(self):
        return self.optimizer(self, self.lr)


def found(model, optimizer, digits, folder):
    """The middle one of three suggestions."""
    images, labels = digits
    suggestions = []
    for seed in range(3):
        torch.manual_seed(seed)
        module = Classifier(model(), optimizer)
        batches = DataLoader(TensorDataset(images[:TRAIN], labels[:TRAIN]), BATCH, shuffle=True)
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=-1, logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, default_root_dir=folder,
        )  # fmt: skip
        finder = Tuner(trainer).lr_find(module, batches, min_lr=1e-3, max_lr=0.3, num_training=200)
        suggestions.append(finder.suggestion())
    return median(suggestions)


@pytest.mark.parametrize("model", CLASSIFIERS.values(), ids=CLASSIFIERS)
def test_the_rate_it_finds_ends_no_higher_than_adamw_at_the_rate_it_finds_for_adamw(model, tmp_path):
    digits = load_digits()
    losses = {}
    for optimizer in (adamw, curvadion):
        lr = found(model, optimizer, digits, tmp_path)
        losses[optimizer] = trained(model, lambda net, own=optimizer, lr=lr: own(net, lr), digits)
        print(f"\n{optimizer.__name__}: {losses[optimizer]:.3f} at {lr:.4f}")
    assert losses[curvadion] < 1.02 * losses[adamw]
