"""A module, its data, and a Trainer on a rank of the pool: what the tests of the strategy share."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import launching
import lightning.pytorch as pl
import preloaded
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from models import Net, parameters_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvadion import CurvaDion, CurvaDionStrategy, EveryNSteps, split_parameters
from lightning_curvadion.optim.shards import local_of

ROOT = Path(__file__).parents[2]


class Member(LightningEnvironment):
    """A process of a group that exists already."""

    def __init__(self, rank, world):
        super().__init__()
        self._member = rank, world

    creates_processes_externally = property(lambda self: True)
    main_address = property(lambda self: "127.0.0.1")

    def world_size(self):
        return self._member[1]

    def global_rank(self):
        return self._member[0]

    local_rank = global_rank


def tokens_loader(seed, shuffle=False):
    tokens = torch.randint(0, 11, (192,), generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(tokens), batch_size=8, shuffle=shuffle)


class Module(pl.LightningModule):
    def __init__(self, trigger=None, optimizer=None):
        super().__init__()
        self.net = Net()
        self.trigger, self.optimizer = trigger or EveryNSteps(3), optimizer
        self.validated, self.before_validation, self.batches = [], [], []
        self.after_step_4 = None

    def training_step(self, batch, batch_idx):
        (tokens,) = batch
        self.batches.append(tokens.tolist())
        return nn.functional.cross_entropy(self.net(tokens), (3 * tokens + 1) % 11)

    def on_train_batch_end(self, *_):
        if self.trainer.global_step == 4:
            self.after_step_4 = parameters_of(self)

    def on_validation_start(self):
        if not self.trainer.sanity_checking:
            self.before_validation.append(parameters_of(self))

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.validated.append(parameters_of(self) + [b.clone() for b in self.buffers()])
        (tokens,) = batch
        self.log("val_loss", nn.functional.cross_entropy(self.net(tokens), (3 * tokens + 1) % 11), sync_dist=True)

    def configure_optimizers(self):
        if self.optimizer is not None:
            return self.optimizer(self.parameters())
        return CurvaDion(split_parameters(self), lr=0.02, trigger=self.trigger)

    def test_step(self, batch, batch_idx):
        (tokens,) = batch
        self.log("test_loss", nn.functional.cross_entropy(self.net(tokens), (3 * tokens + 1) % 11), sync_dist=True)

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])

    def train_dataloader(self):
        return tokens_loader(0, shuffle=True)

    def val_dataloader(self):
        return tokens_loader(1)


def trainer_for(rank, world, strategy=None, **options):
    return pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy or CurvaDionStrategy(),
        plugins=[Member(rank, world), *options.pop("plugins", [])],
        logger=options.pop("logger", False),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=True,
        **{"enable_checkpointing": False, "max_steps": 8, **options},
    )


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def fingerprint(tensors):
    """A digest of the bits of tensors, or of the shards here, where they are compared and nothing else."""
    digest = hashlib.sha256()
    for tensor in map(local_of, tensors):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def python_path(*folders):
    """Where the processes that a test starts look for modules first; with the folder that makes their start quick."""
    return os.pathsep.join([*map(str, folders), os.environ["PYTHONPATH"]])


def smoke_run(benchmark, folder):
    """What a benchmark prints with ``--smoke``."""
    script = ROOT / "examples/benchmarks" / benchmark
    program = launching.start(sys.executable, script, "--smoke", cwd=folder, PYTHONPATH=python_path(ROOT))
    (printed,) = launching.outputs(program)
    return printed


def run_script(script, *arguments, folder, timeout=120):
    """Run a script as a user would, in a folder; its status and what it prints."""
    output, errors = folder / "output", folder / "errors"
    process = preloaded.start(
        script, *arguments, folder=folder, output=output, errors=errors, PYTHONPATH=python_path(ROOT)
    )
    try:
        status = process.wait(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess([script, *arguments], status, output.read_text(), errors.read_text())
