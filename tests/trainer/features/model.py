"""Modules, data modules and data sets."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from training import Module, same, tokens_loader

from lightning_curvadion import CurvaDion, EveryNSteps, split_parameters

from .registry import feature


@feature("model", "buffers")
def buffers_are_averaged(run):
    run.fit(max_steps=9)
    mean = run.modules[0].net.batch_norm.running_mean
    means = [torch.zeros_like(mean) for _ in range(run.world)]
    torch.distributed.all_gather(means, mean)
    # DDP leaves each rank its own statistics until its next forward pass.
    assert mean.abs().sum() > 0 and (not run.under_curvadion or same([mean], means[:1]))


class TiedModule(Module):
    def __init__(self):
        super().__init__()
        self.net.head.weight = self.net.embedding.weight


@feature("model", "tied weights")
def tied_weights_stay_tied(run):
    module = TiedModule()
    run.fit(module)
    assert module.net.head.weight is module.net.embedding.weight


@feature("model", "`sync_batchnorm`")
def sync_batchnorm_is_refused_on_cpus(run):
    # torch has it on GPUs only, and raises under every strategy; test_launch.py trains with it there.
    with pytest.raises(ValueError, match="SyncBatchNorm"):
        run.fit(Module(), sync_batchnorm=True)


class CompilableModule(pl.LightningModule):
    """Without the records and logs of ``Module``, at which a graph would break."""

    def __init__(self):
        super().__init__()
        self.net = Module().net

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), (3 * batch[0] + 1) % 11)

    validation_step = training_step

    def configure_optimizers(self):
        return CurvaDion(split_parameters(self), lr=0.02, trigger=EveryNSteps(3))

    def train_dataloader(self):
        return tokens_loader(0, shuffle=True)

    def val_dataloader(self):
        return tokens_loader(1)


@feature("model", "`torch.compile`")
def a_compiled_module_trains(run):
    compiled_calls = []

    def backend(graph, inputs):
        def call(*arguments):
            compiled_calls.append(len(arguments))
            return graph.forward(*arguments)

        return call

    module = CompilableModule()
    run.modules.append(module)
    run.trainer().fit(torch.compile(module, backend=backend))
    assert len(compiled_calls) >= 8


class ConfiguredModule(Module):
    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = Module().net


@feature("model", "`configure_model`")
def a_module_may_create_its_layers_late(run):
    run.fit(ConfiguredModule())


class TokensDataModule(pl.LightningDataModule):
    def setup(self, stage):
        self.stage = stage

    def train_dataloader(self):
        return tokens_loader(0, shuffle=True)

    def val_dataloader(self):
        return tokens_loader(1)


@feature("model", "`LightningDataModule`")
def a_data_module_is_set_up(run):
    data = TokensDataModule()
    run.fit(data=data)
    assert data.stage == "fit"


class TokensOfRank(IterableDataset):
    def __init__(self, rank):
        self.rank = rank

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.rank)
        while True:
            yield (torch.randint(0, 11, (), generator=generator),)


@feature("model", "`IterableDataset`")
def an_endless_data_set_trains(run):
    run.fit(data=DataLoader(TokensOfRank(run.rank), batch_size=8), limit_val_batches=0)
