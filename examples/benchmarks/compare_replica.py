"""One replica of ``compare.py``, started by torchrun on every host of the lab: trains one run after another.

    python compare_replica.py RUNS_JSON CSV

Rank 0 appends a row to the CSV after every run.
"""

import csv
import datetime
import json
import logging
import os
import sys
import time
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from examples.benchmarks.methods import METHODS
from examples.byte_gpt import ByteGPT, StandardLibrary, Windows
from lightning_curvadion import CurvaDion

CONTEXT, LAYERS, WIDTH, HEADS = 64, 2, 64, 4


@dataclass(frozen=True)
class Run:
    """What to train.

    Attributes:
        method: Name in ``methods.METHODS``.
        replicas: One to a host.
        sequences: Per replica and step.
        steps: Length of the run and of its schedule.
        seed: Of the model and the order of the data.
        lr: Learning rate of the matrices.
        vector_lr: Of embeddings, head and norms.
        rate: Speed of the links; empty for no limit.
        disturbance: What happens in the middle of the run: ``""``, ``"lr"`` or ``"data"``.
        stop: End after so many steps, for timing; 0 trains to the end.
    """

    method: str
    replicas: int
    sequences: int
    steps: int
    seed: int
    lr: float
    vector_lr: float
    rate: str = ""
    disturbance: str = ""
    stop: int = 0

    @property
    def key(self) -> tuple[str, ...]:
        """As the CSV has it."""
        return tuple(str(getattr(self, field.name)) for field in fields(self))


@dataclass(frozen=True)
class Outcome:
    """What came of it. Bytes are of one replica, the mean over all.

    Attributes:
        val_loss: Of the mean of the replicas' parameters, nats a byte.
        sync_steps: Steps that synchronised.
        payload: Bytes that the hook counted in steps.
        kernel_steps: Bytes that the kernel counted in steps; -1 over loopback.
        kernel_total: The same with the consensus at the end of fit.
        seconds: Of the steps.
        peak_mib: How much the resident memory rose above what it was before the model was built.
        spread: Norm of the replicas' distance from their mean over the norm of the mean, before the last consensus; -1
            where it was not measured.
        curve: ``step:loss:kernel bytes:seconds:sync steps`` of every evaluation, joined by blanks.
    """

    val_loss: float
    sync_steps: int
    payload: int
    kernel_steps: int
    kernel_total: int
    seconds: float
    peak_mib: float
    spread: float
    curve: str


class Reversed(Dataset[Tensor]):
    """Text read backwards: the change of data of the disturbed runs."""

    def __init__(self, windows: Windows) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Tensor:
        return self.windows[index].flip(0)


class Disturbance(pl.Callback):
    """From the middle of a run on the text runs backwards, or a tenth of the run has three times the learning rate."""

    def __init__(self, kind: str, steps: int) -> None:
        self.kind, self.start, self.end = kind, steps // 2, steps // 2 + steps // 10

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Before the forward pass."""
        if self.kind == "data" and batch_idx >= self.start:
            batch.copy_(batch.flip(1))
        if self.kind == "lr" and self.start <= batch_idx < self.end:
            for optimizer in trainer.optimizers:
                for group in optimizer.param_groups:
                    # The schedule sets it anew at every step.
                    group["lr"] = 3 * group["lr"]


def kernel_sent() -> int:
    """Bytes this host has sent; -1 where hosts share an interface."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    if interface == "lo":
        return -1
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())


def resident(field: str) -> float:
    """A line of this process's status in MiB: ``VmRSS`` or, since the last reset, ``VmHWM``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


class Meter(pl.Callback):
    """Counts, and evaluates the mean of the replicas on the side: no replica is changed by being looked at."""

    def __init__(self, run: Run, evaluations: int, validation: Dataset[Tensor]) -> None:
        self.dense = METHODS[run.method].ddp
        self.last = run.stop or run.steps
        self.at = {round(run.steps * (number + 1) / evaluations) for number in range(evaluations)} - {self.last}
        self.validation = validation
        self.seconds, self.kernel, self.kernel_at_end, self.payload, self.sync_steps, self.spread = 0.0, 0, 0, 0, 0, 0.0
        self.curve: list[str] = []
        self.loss = float("nan")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Everything is built and the first broadcast is over."""
        self._resume()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count, and evaluate where it is due."""
        optimizer = trainer.optimizers[0]
        report = optimizer.last_step if isinstance(optimizer, CurvaDion) and optimizer.sync_hook else None
        self.sync_steps += report.synced if report else self.dense
        self.payload += report.bytes_sent if report else 0
        if trainer.global_step in self.at:
            self._look(trainer.global_step, cast(ByteGPT, pl_module))
            self._resume()
        elif trainer.global_step == self.last:
            # Not at the end of training, where the strategy's consensus comes before all callbacks.
            self._look(trainer.global_step, cast(ByteGPT, pl_module))
            dist.barrier()
            self.kernel_at_end = kernel_sent()

    def _resume(self) -> None:
        dist.barrier()
        self._kernel, self._start = kernel_sent(), time.perf_counter()

    def _look(self, step: int, module: ByteGPT) -> None:
        # The replicas may be at different steps in time; the slowest one's time counts.
        dist.barrier()
        self.seconds += time.perf_counter() - self._start
        self.kernel += kernel_sent() - self._kernel
        self.loss, self.spread = consensus_loss(module, self.validation)
        self.curve.append(f"{step}:{self.loss:.5f}:{self.kernel}:{self.seconds:.3f}:{self.sync_steps}")


@torch.no_grad()
def consensus_loss(module: ByteGPT, validation: Dataset[Tensor]) -> tuple[float, float]:
    """Loss of the mean of the replicas' parameters, each replica taking its share of the windows; and their spread."""
    rank, world = dist.get_rank(), dist.get_world_size()
    parameters = list(module.parameters())
    own = torch.nn.utils.parameters_to_vector(parameters)
    mean = own.clone()
    dist.all_reduce(mean)
    mean /= world
    torch.nn.utils.vector_to_parameters(mean.clone(), parameters)
    shard = torch.utils.data.Subset(validation, range(rank, len(validation), world))  # type: ignore[arg-type]
    totals = torch.zeros(3, dtype=torch.float64)
    for batch in DataLoader(shard, 256):
        totals += torch.tensor([module.cross_entropy(batch).double() * len(batch), len(batch), 0.0])
    totals[2] = (own - mean).double().square().sum()
    dist.all_reduce(totals)
    torch.nn.utils.vector_to_parameters(own, parameters)
    return float(totals[0] / totals[1]), float((totals[2] / world).sqrt() / mean.norm())


def train(run: Run, evaluations: int, val_sequences: int) -> Outcome:
    """One run; every replica calls it."""
    method = METHODS[run.method]
    pl.seed_everything(run.seed, verbose=False)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    data = StandardLibrary(context=CONTEXT, batch_size=run.sequences)
    size = (data.cache / "val.bin").stat().st_size
    windows = Windows(data.cache / "val.bin", CONTEXT + 1, max(CONTEXT, size // (val_sequences + 1)))
    meter = Meter(run, evaluations, Reversed(windows) if run.disturbance == "data" else windows)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=run.replicas,
        strategy=method.strategy(),
        max_steps=run.stop or run.steps,
        callbacks=[*method.callbacks(), Disturbance(run.disturbance, run.steps), meter],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    optimizer = partial(method.optimizer, lr=run.lr, vector_lr=run.vector_lr)
    module = ByteGPT(optimizer, LAYERS, WIDTH, HEADS, CONTEXT, run.vector_lr)
    trainer.fit(module, data.train_dataloader())
    dist.barrier()
    total = meter.kernel + kernel_sent() - meter.kernel_at_end
    counted = torch.tensor([meter.payload, meter.kernel, total], dtype=torch.float64)
    dist.all_reduce(counted)
    payload, kernel, total = (counted / run.replicas).round().long().tolist()
    return Outcome(
        val_loss=round(meter.loss, 5),
        sync_steps=meter.sync_steps,
        payload=payload,
        kernel_steps=kernel,
        kernel_total=total,
        seconds=round(meter.seconds, 3),
        peak_mib=round(resident("VmHWM") - before, 1),
        spread=round(meter.spread, 5),
        curve=" ".join(meter.curve),
    )


def append(path: Path, run: Run, outcome: Outcome) -> None:
    """Add a row to the CSV, with what made it."""
    row = {**asdict(run), **asdict(outcome), "commit": os.environ.get("COMPARE_COMMIT", "")}
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row.keys())
        if new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    """Train the runs of the JSON in turn."""
    torch.set_num_threads(1)
    # Or every run of many tells which devices there are.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # Once for all runs: a Trainer takes the group that it finds.
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=10))
    job = json.loads(sys.argv[1])
    for words in job["runs"]:
        run = Run(**words)
        outcome = train(run, job["evaluations"], job["val_sequences"])
        if dist.get_rank() == 0:
            append(Path(sys.argv[2]), run, outcome)
            print(
                f"{run.method}: loss {outcome.val_loss:.4f}, {outcome.kernel_steps / 1e6:.2f} MB,"
                f" {outcome.sync_steps} syncs, {outcome.seconds:.0f} s  ({', '.join(run.key[1:])})",
                flush=True,
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
