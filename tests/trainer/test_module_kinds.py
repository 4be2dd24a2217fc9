"""Modules of every kind that split_parameters knows train on replicas, and end as one model."""

import sys
from importlib.util import find_spec

import lightning.pytorch as pl
import torch
from module_kinds import KINDS, OF_TRANSFORMERS
from torch.utils.data import DataLoader
from training import fingerprint, trainer_for

from lightning_curvadion import CurvaDion, EveryNSteps, split_parameters


class Regression(pl.LightningModule):
    """Any model, on a batch of its own replica."""

    def __init__(self, kind, rank):
        super().__init__()
        torch.manual_seed(0)
        self.model, batch = KINDS[kind]()
        generator = torch.Generator().manual_seed(rank)
        floats = batch.is_floating_point()
        self.batch = torch.randn(batch.shape, generator=generator) if floats else batch.roll(rank, dims=0)

    def training_step(self, _, batch_idx):
        return (self.model(self.batch) - 1).square().mean()

    def configure_optimizers(self):
        return CurvaDion(split_parameters(self), lr=0.05, trigger=EveryNSteps(2))

    def train_dataloader(self):
        return DataLoader(range(64))


def fit_every_kind(rank, world, kinds):
    if sys.modules.get("transformers", True) is None:
        # helpers/lean hides it, for a quick start.
        del sys.modules["transformers"]
    ends = {}
    for kind in kinds:
        module = Regression(kind, rank)
        start = {name: p.detach().clone() for name, p in module.named_parameters()}
        trainer_for(rank, world, max_steps=3).fit(module)
        # In step 2 of 3 they synchronised, so it is the consensus at the end that makes them equal.
        optimizer = module.optimizers().optimizer
        left = {name for name, p in optimizer.named_parameters() if p.numel() and torch.equal(p, start[name])}
        ends[kind] = fingerprint(module.parameters()), fingerprint(module.buffers()), left
    return ends


def test_modules_of_every_kind_train_on_replicas_and_end_equal(replicas):
    kinds = [kind for kind in KINDS if find_spec("transformers") or kind not in OF_TRANSFORMERS]
    first, second = replicas.run(2, fit_every_kind, kinds, timeout=180)
    for kind in kinds:
        parameters, buffers, untrained = first[kind]
        assert (parameters, buffers) == second[kind][:2], kind
        # Frozen layers, and experts that no token of so few was sent to.
        assert not untrained or kind in ("lora", "mixtral", "gpt_oss"), (kind, untrained)
