"""A training script that breaks: one rank, started by hand, by Lightning or by torchrun.

    python failing.py JSON

The JSON is a ``Job``: what to train, and what to break. At its end each rank writes ``rank<n>.json`` into the folder:
how it ended, at which step, and a digest of the parameters.
"""

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint, OnExceptionCheckpoint
from models import Net
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training import fingerprint

from lightning_curvadion import CurvaDion, CurvaDionStrategy, EveryNSteps, split_parameters


@dataclass(frozen=True)
class Job:
    """What a run does.

    Attributes:
        folder: Where everything is written.
        steps: Optimizer steps.
        devices: Processes on this node.
        timeout: Timeout of the process group, seconds.
        victim: Rank that is hit; -1 for none.
        step: First step at which it is hit.
        what: ``"kill"``, ``"raise"``, ``"stop"`` (SIGSTOP), ``"term"`` (SIGTERM), ``"interrupt"`` (SIGINT) or
            ``"requeue"`` (SIGUSR1, as SLURM sends it before the time is up); several with a comma and a space between.
        where: ``"forward"``, ``"agreement"`` (the all-reduce of any step) or ``"sync"`` (the other collectives of a
            sync step).
        every: Steps from one checkpoint to the next; 0 for none.
        save: Whether an exception leaves a checkpoint.
        resume: A checkpoint, or ``"last"``.
        watch: Steps from one reading of memory and open files to the next; 0 for none.
        accelerator: ``"cpu"`` or ``"gpu"``.
        delays: The strategy's lag and overlap; empty for its defaults.
        replica_size: Processes of a replica.
        sharded: Whether they share one module.
    """

    folder: str
    steps: int = 20
    devices: int = 2
    timeout: float = 20.0
    victim: int = -1
    step: int = 0
    what: str = ""
    where: str = "forward"
    every: int = 0
    save: bool = True
    resume: str | None = None
    watch: int = 0
    accelerator: str = "cpu"
    delays: tuple[int, ...] = ()
    replica_size: int = 1
    sharded: bool = False


class Module(pl.LightningModule):
    """Its data depend on the rank and the step alone, so that a run can resume at any step."""

    def __init__(self, sharded: bool = False) -> None:
        super().__init__()
        self.net = Net()
        self.sharded = sharded

    def configure_model(self) -> None:
        if self.sharded:
            # Seconds to import.
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.trainer.global_rank + self.trainer.global_step)
        tokens = torch.randint(0, 11, (24,), generator=generator).to(self.device)
        return nn.functional.cross_entropy(self.net(tokens), (3 * tokens + 1) % 11)

    def configure_optimizers(self) -> CurvaDion:
        return CurvaDion(split_parameters(self), lr=0.02, trigger=EveryNSteps(3))


class Sabotage(Callback):
    """Hits the victim, once."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.armed = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self.trainer = trainer
        # The strategy's default has a lag.
        agreement = "all_to_all_single" if any(self.job.delays or (1,)) else "all_reduce"
        collectives = {"agreement": [agreement], "sync": ["all_gather", "all_to_all_single"]}
        for name in collectives.get(self.job.where, []):
            original = getattr(dist, name)

            def sabotaged(*args, original=original, **options):
                self.hit()
                return original(*args, **options)

            setattr(dist, name, sabotaged)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if self.job.where == "forward":
            self.hit()

    def hit(self) -> None:
        job, trainer = self.job, self.trainer
        if not (self.armed and trainer.global_rank == job.victim and trainer.global_step >= job.step):
            return
        self.armed = False
        (Path(job.folder) / "hit").write_text(str(time.time()))
        if job.what == "raise":
            raise ArithmeticError("the batch is broken")
        names = {"kill": "SIGKILL", "stop": "SIGSTOP", "term": "SIGTERM", "interrupt": "SIGINT", "requeue": "SIGUSR1"}
        for what in job.what.split(", "):
            os.kill(os.getpid(), signal.Signals[names[what]])


class EndReport(Checkpoint):
    """Reports how a rank ended. A ``Checkpoint``, or the Trainer would move it before those."""

    def __init__(self, folder: str, watch: int) -> None:
        self.folder, self.watch = folder, watch
        self.readings: list[tuple[int, int, int]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if self.watch and trainer.global_step % self.watch == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            files = len(os.listdir("/proc/self/fd"))
            self.readings.append((trainer.global_step, pages * os.sysconf("SC_PAGE_SIZE"), files))

    def report(self, trainer: pl.Trainer, module: pl.LightningModule, how: str) -> None:
        report = {
            "how": how,
            "step": trainer.global_step,
            "digest": fingerprint(module.parameters()),
            "readings": self.readings,
        }
        (Path(self.folder) / f"rank{trainer.global_rank}.json").write_text(json.dumps(report))

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self.report(trainer, module, type(exception).__name__)

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.report(trainer, module, "finished")


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    # Before EndReport, which comes after its checkpoint is written.
    saved = [OnExceptionCheckpoint(job.folder)] if job.save else []
    callbacks: list[Callback] = [Sabotage(job), *saved, EndReport(job.folder, job.watch)]
    if job.every:
        callbacks.append(
            ModelCheckpoint(job.folder, "{step}", every_n_train_steps=job.every, save_top_k=-1, save_last=True)
        )
    trainer = pl.Trainer(
        accelerator=job.accelerator,
        devices=job.devices,
        strategy=CurvaDionStrategy(
            timeout=timedelta(seconds=job.timeout),
            replica_size=job.replica_size,
            **dict(zip(("lag", "overlap"), job.delays, strict=False)),
        ),
        max_steps=job.steps,
        default_root_dir=job.folder,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(job.sharded), DataLoader(torch.zeros(10**6), batch_size=1), ckpt_path=job.resume)


if __name__ == "__main__":
    main()
