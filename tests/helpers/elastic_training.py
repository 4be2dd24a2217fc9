"""A replica of a Trainer's run that others leave and join: ``elastic_run.py`` starts it.

    python elastic_training.py NAME JSON

It prints a line of JSON for every batch, and at its end what became of it. It may kill itself in a place of its choice.
"""

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as pl
import torch
from launching import ROOT
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from models import Net
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.data import DataLoader, Subset, TensorDataset
from training import fingerprint

from examples.byte_gpt import GPT, StandardLibrary, Windows, warmup_and_cooldown
from lightning_curvadion import CommunicationMonitor, CurvaDion, CurvaDionStrategy, EveryNSteps, split_parameters
from lightning_curvadion.trainer.checkpoint_io import AtomicCheckpointIO


class Module(pl.LightningModule):
    """Learns a function of eleven tokens, and says which samples it trains on."""

    def __init__(self, options: dict) -> None:
        super().__init__()
        self.net, self.options = Net(layers=options.get("layers", 2)), options
        self.register_buffer("seen", torch.zeros(()))

    def loss_of(self, samples: Tensor) -> Tensor:
        tokens = samples % 11
        return nn.functional.cross_entropy(self.net(tokens), (3 * tokens + 1) % 11)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        # A batch that hangs for a while.
        hangs = self.global_step == self.options.get("still", {}).get(self.options["name"])
        time.sleep(15 if hangs else self.options["sleep"])
        (samples,) = batch
        trainer = self.trainer
        line = {"epoch": self.current_epoch, "batch": batch_idx, "step": self.global_step, "samples": samples.tolist()}
        line |= {"rank": trainer.global_rank, "size": trainer.world_size, "batches": trainer.num_training_batches}
        line["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        print(json.dumps(line), flush=True)
        loss = self.loss_of(samples)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss_of(batch[0]), sync_dist=True)

    def configure_optimizers(self) -> dict:
        optimizer = CurvaDion(split_parameters(self), lr=0.02, trigger=EveryNSteps(3))
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=self.options["decay"])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Text(pl.LightningModule):
    """A byte-level GPT on Python's standard library."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.net, self.steps = GPT(layers=2, width=64, heads=4, context=64), steps

    def loss_of(self, batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.global_step % 10 == 0:
            print(json.dumps({"step": self.global_step, "size": self.trainer.world_size}), flush=True)
        return self.loss_of(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss_of(batch), sync_dist=True)

    def configure_optimizers(self) -> dict:
        optimizer = CurvaDion(split_parameters(self), lr=0.02)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_and_cooldown(step, self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Changes(Callback):
    """Prints what happens to the replicas."""

    printed = 0

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        changes = trainer.strategy.membership_changes
        for change in changes[self.printed :]:
            line = {"why": change.kind, "seconds": change.seconds, "size": change.members, "step": trainer.global_step}
            print(json.dumps(line), flush=True)
        self.printed = len(changes)


class Kill(Callback):
    """Kills the process of a rank, once in a run, in a place from some step on.

    ``place`` is ``"forward"``, ``"validation"``, ``"checkpoint"``, or a phase of a step as a profiler shows it; a ``/``
    behind a phase or a checkpoint stands for its end.
    """

    def __init__(self, place: str, step: int, rank: int) -> None:
        self.place, self.step, self.rank = place, step, rank

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self.trainer = trainer
        self.surround(record_function, "__enter__", lambda region: f"{region.name}".removeprefix("curvadion::"), "/")
        self.surround(record_function, "__exit__", lambda region: f"{region.name}/".removeprefix("curvadion::"), "")
        self.surround(AtomicCheckpointIO, "save_checkpoint", lambda _: "checkpoint", "checkpoint/")

    def surround(self, owner: type, name: str, before, after: str) -> None:
        original = getattr(owner, name)

        def surrounded(instance, *arguments, **options):
            self.reach(before(instance))
            result = original(instance, *arguments, **options)
            self.reach(after)
            return result

        setattr(owner, name, surrounded)

    def on_train_batch_start(self, *_: object) -> None:
        self.reach("forward")

    def on_validation_batch_end(self, *_: object) -> None:
        self.reach("validation")

    def reach(self, place: str) -> None:
        trainer = self.trainer
        here = place == self.place and trainer.global_step >= self.step and trainer.global_rank == self.rank
        if here and not (hit := Path("hit")).exists():
            hit.touch()
            print(json.dumps({"killed": place}), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)


def task(options: dict) -> tuple[pl.LightningModule, DataLoader, DataLoader]:
    """What is trained, on what, and how it is validated."""
    if options.get("text"):
        data = StandardLibrary(context=64, cache=str(ROOT / ".data"))
        train, val = (Windows(data.cache / f"{part}.bin", 65, 64) for part in ("train", "val"))
        sample = Subset(val, range(0, len(val), len(val) // 512))
        return Text(options["steps"]), DataLoader(train, batch_size=8, shuffle=True), DataLoader(sample, batch_size=32)
    train, val = (TensorDataset(torch.arange(count)) for count in (options["samples"], 22))
    workers = options.get("workers", 0)
    batches = DataLoader(train, batch_size=4, shuffle=True, num_workers=workers, drop_last=True)
    return Module(options), batches, DataLoader(val, 4)


def main() -> None:
    options = {"name": sys.argv[1], **json.loads(sys.argv[2])}
    torch.set_num_threads(1)
    host, _, port = options["endpoint"].rpartition(":")
    os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": port, "LOCAL_RANK": "0"}
    strategy = CurvaDionStrategy(
        elastic=True,
        min_replicas=options["min_replicas"],
        timeout=timedelta(seconds=options.get("timeout", 10)),
        **options["hook"],
    )
    folder = str(Path.cwd())
    checkpoints = ModelCheckpoint(folder, "{step}", every_n_train_steps=options.get("every", 25), save_top_k=-1)
    callbacks: list[Callback] = [CommunicationMonitor(), checkpoints, Changes()]
    if "kill" in options:
        callbacks.append(Kill(*options["kill"]))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        max_epochs=options.get("epochs", -1),
        max_steps=options.get("steps", -1),
        val_check_interval=options.get("val_check_interval", 1.0),
        check_val_every_n_epoch=None if options.get("text") else 1,
        callbacks=callbacks,
        logger=CSVLogger(folder, name="logs"),
        log_every_n_steps=5,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module, train, val = task(options)
    trainer.fit(module, train, val)
    end = {"end": trainer.global_step, "epoch": trainer.current_epoch, "rank": trainer.global_rank}
    end["digest"] = fingerprint([*module.parameters(), *module.buffers()])
    end["loss"] = float(trainer.callback_metrics["val_loss"])
    end["changes"] = [vars(change) for change in strategy.membership_changes]
    print(json.dumps(end), flush=True)


if __name__ == "__main__":
    main()
