"""What a Trainer does, row by row: each is run under ``curvadion`` and under ``ddp``, on two replicas.

A row is a function of a ``Run``; it trains, and asserts what is its own. What holds of every row is in
``test_trainer.py``. The README's table "Works with" names exactly these rows.
"""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    Callback,
    Checkpoint,
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.tuner import Tuner
from models import parameters_of
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from training import Module, same, tokens_loader, trainer_for

from lightning_curvadion import CurvaDion, CurvaDionStrategy, EveryNSteps, split_parameters

ROWS: dict[tuple[str, str], Callable[["Run"], None]] = {}


def row(area: str, *names: str) -> Callable:
    """Register a row; a function of several names is told which one it is."""

    def register(function: Callable) -> Callable:
        for name in names:
            ROWS[area, name] = function
        return function

    return register


class Run:
    """One rank of a row under one strategy."""

    def __init__(self, rank: int, world: int, strategy: str, name: str, folder: str) -> None:
        self.rank, self.world, self.strategy, self.name = rank, world, strategy, name
        self.folder = Path(folder) / strategy
        self.trainers: list[pl.Trainer] = []
        self.modules: list[pl.LightningModule] = []
        pl.seed_everything(0, verbose=False)

    @property
    def ours(self) -> bool:
        return self.strategy == "curvadion"

    def trainer(self, **options) -> pl.Trainer:
        strategy = CurvaDionStrategy() if self.ours else DDPStrategy(find_unused_parameters=True)
        trainer = trainer_for(self.rank, self.world, strategy, **options)
        self.trainers.append(trainer)
        return trainer

    def fit(self, module: pl.LightningModule | None = None, data=None, **options) -> pl.Trainer:
        trainer = self.trainer(**options)
        module = module if module is not None else Module()
        self.modules.append(module)
        trainer.fit(module, data)
        return trainer

    def told(self) -> dict:
        """What both strategies, and both ranks, must agree on."""
        return {
            "steps": [trainer.global_step for trainer in self.trainers],
            "epochs": [trainer.current_epoch for trainer in self.trainers],
            "metrics": [sorted(trainer.callback_metrics) for trainer in self.trainers],
            "files": sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*.ckpt")),
            "parameters": [parameters_of(module) for module in self.modules],
            "validated": [seen for module in self.modules for seen in module.validated],
        }


# -- precision ----------------------------------------------------------------------------------------------


@row("precision", "32-true", "64-true", "bf16-true", "bf16-mixed")
def precision(run):
    module = Module()
    run.fit(module, precision=run.name)
    wanted = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(run.name, torch.float32)
    assert {parameter.dtype for parameter in module.parameters()} == {wanted}


class Overflowing(Module):
    """One rank's loss overflows at one batch."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx == 3 and self.trainer.global_rank == 1 else loss


class Scales(Callback):
    def __init__(self):
        self.scales, self.parameters = [], []

    def on_train_batch_end(self, trainer, module, *_):
        self.scales.append(trainer.precision_plugin.scaler.get_scale())
        self.parameters.append(parameters_of(module))


@row("precision", "16-mixed")
def overflow(run):
    # On a CPU Lightning replaces the flag by bf16-mixed, so the plugin is named.
    seen = Scales()
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    options = {"max_steps": -1, "max_epochs": 1, "limit_train_batches": 8}
    run.fit(Overflowing(), callbacks=[seen], plugins=[plugin], **options)
    # The step of the fourth batch was skipped on both ranks, and both scales fell.
    assert seen.scales == [1024.0] * 3 + [512.0] * 5, seen.scales
    assert same(seen.parameters[2], seen.parameters[3]) and not same(seen.parameters[3], seen.parameters[4])


# -- loops ----------------------------------------------------------------------------------------------


@row("loops", "validation within an epoch", "validation between epochs", "sanity check", "`limit_*`")
def validation(run):
    options = {
        "validation within an epoch": {"val_check_interval": 4},
        "validation between epochs": {"max_steps": -1, "max_epochs": 2, "limit_train_batches": 4},
        "sanity check": {"num_sanity_val_steps": 2},
        "`limit_*`": {"max_steps": -1, "max_epochs": 2, "limit_train_batches": 0.25, "limit_val_batches": 2},
    }[run.name]
    trainer = run.fit(**options)
    assert "val_loss" in trainer.callback_metrics or run.name == "sanity check"


@row("loops", "test", "predict")
def evaluation(run):
    trainer = run.fit()
    if run.name == "test":
        (result,) = trainer.test(run.modules[0], tokens_loader(1), verbose=False)
        assert result["test_loss"] > 0
    else:
        assert trainer.predict(run.modules[0], tokens_loader(1))[0].shape == (8, 11)


@row("loops", "`fast_dev_run`", "`overfit_batches`", "`max_steps`", "several epochs, shuffled")
def loops(run):
    options = {
        "`fast_dev_run`": {"fast_dev_run": 3, "max_steps": -1},
        "`overfit_batches`": {"overfit_batches": 2, "max_steps": -1, "max_epochs": 3},
        "`max_steps`": {"max_steps": 7},
        "several epochs, shuffled": {"max_steps": -1, "max_epochs": 3, "limit_train_batches": 4},
    }[run.name]
    trainer = run.fit(**options)
    expected = {"`fast_dev_run`": 3, "`overfit_batches`": 6, "`max_steps`": 7, "several epochs, shuffled": 12}
    assert trainer.global_step == expected[run.name]
    if run.name == "several epochs, shuffled":
        batches = run.modules[0].batches
        assert batches[:4] != batches[4:8]


class Slow(Module):
    def training_step(self, batch, batch_idx):
        time.sleep(0.05 * (1 + self.trainer.global_rank))
        return super().training_step(batch, batch_idx)


@row("loops", "`max_time`")
def max_time(run):
    timer = Timer(timedelta(seconds=1))
    trainer = run.fit(Slow(), max_steps=10_000, max_epochs=-1, callbacks=[timer])
    assert 0 < trainer.global_step < 100
    # Where a clock decides, the number of steps is no business of the comparison.
    run.trainers.clear()


class Reloaded(Module):
    loaded = 0

    def train_dataloader(self):
        self.loaded += 1
        return tokens_loader(self.loaded)


@row("loops", "`reload_dataloaders_every_n_epochs`")
def reload(run):
    module = Reloaded()
    run.fit(module, max_steps=-1, max_epochs=3, limit_train_batches=2, reload_dataloaders_every_n_epochs=1)
    assert module.loaded == 3


# -- optimisation ----------------------------------------------------------------------------------------------


@row("optimisation", "`accumulate_grad_batches`")
def accumulate(run):
    trainer = run.fit(accumulate_grad_batches=2, max_steps=4)
    assert len(run.modules[0].batches) == 8 and trainer.global_step == 4


class Clipped(Callback):
    def __init__(self):
        self.largest = []

    def on_before_zero_grad(self, trainer, module, optimizer):
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        if gradients:
            self.largest.append(
                (nn.utils.get_total_norm(gradients).item(), max(g.abs().max().item() for g in gradients))
            )


@row("optimisation", "`gradient_clip_val` by norm", "`gradient_clip_val` by value")
def clip(run):
    seen = Clipped()
    algorithm = run.name.split()[-1]
    run.fit(gradient_clip_val=0.01, gradient_clip_algorithm=algorithm, callbacks=[seen])
    norms, values = zip(*seen.largest, strict=True)
    assert max(norms if algorithm == "norm" else values) <= 0.0101
    assert algorithm == "norm" or max(norms) > 0.0101


class Scheduled(Module):
    def __init__(self, name):
        super().__init__()
        self.name, self.rates = name, []

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedulers = torch.optim.lr_scheduler
        scheduler = {
            "`StepLR`": lambda: schedulers.StepLR(optimizer, 1, gamma=0.5),
            "`OneCycleLR`": lambda: schedulers.OneCycleLR(optimizer, 0.05, total_steps=13, cycle_momentum=False),
            "`CosineAnnealingWarmRestarts`": lambda: schedulers.CosineAnnealingWarmRestarts(optimizer, 3),
            "`SequentialLR`": lambda: schedulers.SequentialLR(
                optimizer, [schedulers.ConstantLR(optimizer, 0.5, 2), schedulers.ExponentialLR(optimizer, 0.9)], [2]
            ),
            "`ReduceLROnPlateau`": lambda: schedulers.ReduceLROnPlateau(optimizer, patience=0, threshold=100.0),
        }[self.name]()
        every = "epoch" if self.name in ("`StepLR`", "`ReduceLROnPlateau`") else "step"
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": every, "monitor": "val_loss"},
        }

    def on_train_batch_start(self, *_):
        self.rates.append(self.optimizers().param_groups[0]["lr"])


@row(
    "optimisation",
    "`StepLR`",
    "`OneCycleLR`",
    "`CosineAnnealingWarmRestarts`",
    "`SequentialLR`",
    "`ReduceLROnPlateau`",
)
def schedule(run):
    module = Scheduled(run.name)
    run.fit(module, max_steps=-1, max_epochs=3, limit_train_batches=4)
    assert len(set(module.rates)) >= 3


class Manual(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.clip_gradients(optimizer, 1.0, "norm")
        optimizer.step()


@row("optimisation", "manual optimisation")
def manual(run):
    run.fit(Manual())


class Gan(Module):
    """Two optimizers that step in turn, each with the other's parameters frozen."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Sequential(nn.Linear(11, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        (tokens,) = batch
        self.batches.append(tokens.tolist())
        generator, critic = self.optimizers()
        real = nn.functional.one_hot(tokens, 11).float()
        self.toggle_optimizer(critic)
        critic.zero_grad()
        scores = self.critic(torch.cat([real, self.net(tokens).detach()]))
        self.manual_backward(nn.functional.binary_cross_entropy_with_logits(scores, scores.detach() * 0 + 0.5))
        critic.step()
        self.untoggle_optimizer(critic)
        self.toggle_optimizer(generator)
        generator.zero_grad()
        self.manual_backward(nn.functional.softplus(-self.critic(self.net(tokens))).mean())
        generator.step()
        self.untoggle_optimizer(generator)

    def configure_optimizers(self):
        return [
            CurvaDion(split_parameters(part), lr=0.02, trigger=EveryNSteps(n))
            for part, n in ((self.net, 3), (self.critic, 2))
        ]


@row("optimisation", "several CurvaDion optimizers (GAN)")
def gan(run):
    run.fit(Gan(), max_steps=14)


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, module):
        self.freeze([module.net.up, module.net.embedding])

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.net.up, optimizer, initial_denom_lr=2)


class Late(Module):
    """An optimizer that has never heard of what is frozen at first."""

    def configure_optimizers(self):
        groups = split_parameters(self)
        for group in groups:
            group["params"] = [(name, p) for name, p in group["params"] if p.requires_grad]
        return CurvaDion([group for group in groups if group["params"]], lr=0.02, trigger=EveryNSteps(3))


class UnfreezeLate(Unfreeze):
    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.make_trainable(module.net.up)
            optimizer.add_param_group({"params": [layer.weight for layer in module.net.up], "lr": 0.01})
            biases = [layer.bias for layer in module.net.up]
            optimizer.add_param_group({"params": biases, "lr": 0.01, "algorithm": "adamw"})


@row("optimisation", "frozen and unfrozen parameters (`BaseFinetuning`)", "parameter groups added later")
def finetuning(run):
    late = "later" in run.name
    module = Late() if late else Module()
    before = module.net.up[0].weight.detach().clone(), module.net.embedding.weight.detach().clone()
    callback = UnfreezeLate() if late else Unfreeze()
    run.fit(module, callbacks=[callback], max_steps=-1, max_epochs=2, limit_train_batches=5)
    assert not torch.equal(before[0], module.net.up[0].weight)
    assert torch.equal(before[1], module.net.embedding.weight)


class PartlyUsed(Module):
    """A layer that only some ranks use, or none."""

    def __init__(self, users):
        super().__init__()
        self.users, self.extra = users, nn.Linear(11, 11)

    def training_step(self, batch, batch_idx):
        (tokens,) = batch
        self.batches.append(tokens.tolist())
        logits = self.net(tokens)
        if self.trainer.global_rank in self.users:
            logits = self.extra(logits)
        return nn.functional.cross_entropy(logits, (3 * tokens + 1) % 11)


@row("optimisation", "parameters unused on one rank", "parameters unused on all ranks")
def unused(run):
    module = PartlyUsed([1] if "one" in run.name else [])
    before = module.extra.weight.detach().clone()
    run.fit(module)
    # A matrix that nobody used decays, as with any gradient of zero, but under DDP, which leaves no gradient at all.
    assert "all" in run.name or not torch.equal(before, module.extra.weight)


# -- model ----------------------------------------------------------------------------------------------


@row("model", "buffers")
def buffers(run):
    run.fit(max_steps=9)
    mean = run.modules[0].net.batch_norm.running_mean
    everyone = [torch.zeros_like(mean) for _ in range(run.world)]
    torch.distributed.all_gather(everyone, mean)
    # DDP leaves each rank its own statistics until its next forward pass.
    assert mean.abs().sum() > 0 and (not run.ours or same([mean], everyone[:1]))


class Tied(Module):
    def __init__(self):
        super().__init__()
        self.net.head.weight = self.net.embedding.weight


@row("model", "tied weights")
def tied(run):
    module = Tied()
    run.fit(module)
    assert module.net.head.weight is module.net.embedding.weight


@row("model", "`sync_batchnorm`")
def sync_batchnorm(run):
    module = Module()
    # torch has it on GPUs only, and says so under every strategy; test_launch.py trains with it there.
    with pytest.raises(ValueError, match="SyncBatchNorm"):
        run.fit(module, sync_batchnorm=True)


@row("model", "`torch.compile`")
def compiled(run):
    module = Module()
    run.modules.append(module)
    run.trainer().fit(torch.compile(module, backend="eager"))


class Configured(Module):
    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = Module().net


@row("model", "`configure_model`")
def configured(run):
    run.fit(Configured())


class Data(pl.LightningDataModule):
    def setup(self, stage):
        self.stage = stage

    def train_dataloader(self):
        return tokens_loader(0, shuffle=True)

    def val_dataloader(self):
        return tokens_loader(1)


@row("model", "`LightningDataModule`")
def datamodule(run):
    data = Data()
    run.fit(data=data)
    assert data.stage == "fit"


class Stream(IterableDataset):
    def __init__(self, rank):
        self.rank = rank

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.rank)
        while True:
            yield (torch.randint(0, 11, (), generator=generator),)


@row("model", "`IterableDataset`")
def iterable(run):
    run.fit(data=DataLoader(Stream(run.rank), batch_size=8), limit_val_batches=0)


# -- callbacks ----------------------------------------------------------------------------------------------


@row("callbacks", "`ModelCheckpoint`: top-k", "`ModelCheckpoint`: every n steps, `save_last`")
def checkpoints(run):
    if "top-k" in run.name:
        callback = ModelCheckpoint(run.folder, "{epoch}", monitor="val_loss", save_top_k=2)
    else:
        callback = ModelCheckpoint(run.folder, "{step}", every_n_train_steps=5, save_top_k=-1, save_last=True)
    run.fit(callbacks=[callback], enable_checkpointing=True, max_steps=-1, max_epochs=3, limit_train_batches=4)
    assert len(list(run.folder.glob("*.ckpt"))) >= 2 and not list(run.folder.glob(".*"))
    best = callback.best_model_path or callback.last_model_path
    loaded = torch.load(best, weights_only=True)
    assert set(loaded["state_dict"]) == set(run.modules[0].state_dict())


class Worsening(Module):
    """Ranks that disagree on whether the metric gets better."""

    def validation_step(self, batch, batch_idx):
        down = self.trainer.global_rank == 0
        epoch = self.trainer.current_epoch
        self.log("val_loss", float(-epoch if down else 2 * epoch), sync_dist=True)


@row("callbacks", "`EarlyStopping`")
def early(run):
    stop = EarlyStopping("val_loss", patience=1)
    trainer = run.fit(Worsening(), callbacks=[stop], max_steps=-1, max_epochs=10, limit_train_batches=2)
    assert trainer.current_epoch < 4


class Dumped(Checkpoint):
    """What this rank would write. A ``Checkpoint``, so as to come after the callbacks that change it."""

    def on_save_checkpoint(self, trainer, module, checkpoint):
        self.weights = [tensor.clone() for tensor in checkpoint["state_dict"].values()]


@row("callbacks", "`WeightAveraging` (EMA)", "`StochasticWeightAveraging`")
def averaging(run):
    if "EMA" in run.name:
        # Not in the oldest Lightning that we run on.
        average = pl.callbacks.EMAWeightAveraging(decay=0.8)
    else:
        average = StochasticWeightAveraging(0.01, swa_epoch_start=1)
    checkpoint, dumped = ModelCheckpoint(run.folder, "last", every_n_epochs=1), Dumped()
    run.fit(
        callbacks=[average, checkpoint, dumped],
        enable_checkpointing=True,
        max_steps=-1,
        max_epochs=4,
        limit_train_batches=3,
    )
    everyone = [None] * run.world
    torch.distributed.all_gather_object(everyone, dumped.weights)
    assert same(everyone[0], everyone[1]) or not run.ours


@row("callbacks", "`LearningRateMonitor`", "`ModelSummary`", "`DeviceStatsMonitor`")
def monitors(run):
    monitor = {
        "`LearningRateMonitor`": lambda: LearningRateMonitor("step"),
        "`ModelSummary`": lambda: ModelSummary(max_depth=2),
        "`DeviceStatsMonitor`": lambda: DeviceStatsMonitor(cpu_stats=True),
    }[run.name]()
    run.fit(callbacks=[monitor], logger=CSVLogger(run.folder), log_every_n_steps=2)
    if run.rank == 0 and run.name != "`ModelSummary`":
        (metrics,) = run.folder.rglob("metrics.csv")
        assert ("lr-CurvaDion" if "Rate" in run.name else "cpu_percent") in metrics.read_text()


# -- tools ----------------------------------------------------------------------------------------------


@row("tools", "simple profiler", "advanced profiler", "PyTorch profiler")
def profilers(run):
    profiler = {
        "simple profiler": lambda: SimpleProfiler(),
        "advanced profiler": lambda: AdvancedProfiler(),
        "PyTorch profiler": lambda: PyTorchProfiler(emit_nvtx=False, export_to_chrome=False, dirpath=run.folder),
    }[run.name]()
    run.fit(profiler=profiler, limit_val_batches=0, max_steps=6)
    if run.name == "PyTorch profiler" and run.ours:
        named = {event.key for event in profiler.profiler.key_averages()} if profiler.profiler else set()
        named |= {event.name for event in profiler.function_events or ()}
        wanted = {"curvadion::rmmc", "curvadion::agreement", "curvadion::local_step", "curvadion::sync_step"}
        assert wanted <= named, named


@row("tools", "`Tuner.lr_find`")
def lr_find(run):
    class Tuned(Module):
        lr = 0.02

        def configure_optimizers(self):
            return CurvaDion(split_parameters(self), lr=self.lr, trigger=EveryNSteps(3))

    module = Tuned()
    trainer = run.trainer(max_steps=5, default_root_dir=run.folder)
    run.modules.append(module)
    found = Tuner(trainer).lr_find(module, num_training=12, min_lr=1e-4, max_lr=0.1, update_attr=True)
    assert len(found.results["lr"]) == 12
    trainer.fit(module)
    assert trainer.global_step == 5


@row("tools", "`CSVLogger`", "`TensorBoardLogger`")
def loggers(run):
    logger = CSVLogger(run.folder) if "CSV" in run.name else pl.loggers.TensorBoardLogger(run.folder)
    run.fit(logger=logger, log_every_n_steps=1, val_check_interval=4)
    assert run.rank != 0 or any(run.folder.rglob("metrics.csv" if "CSV" in run.name else "events.*"))


@row("tools", "`seed_everything`: repeats bit for bit")
def repeats(run):
    for _ in range(2):
        pl.seed_everything(7, verbose=False)
        run.fit()
    first, second = (parameters_of(module) for module in run.modules)
    assert same(first, second)


@row("launch", "fit, test and fit again")
def again(run):
    trainer = run.fit()
    trainer.test(run.modules[0], tokens_loader(1), verbose=False)
    trainer.fit_loop.epoch_loop.max_steps = 12
    trainer.fit(run.modules[0])
    assert trainer.global_step == 12
