"""One replica of ``compare.py``: torchrun starts it on every host of the lab, and it trains one run after another.

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

from examples.benchmarks.corpora import CORPORA, SIZES
from examples.benchmarks.methods import METHODS
from examples.byte_gpt import ByteGPT, Windows
from lightning_curvadion import CurvaDion

CONTEXT = 64
# Trainer arguments of a replica that only trains.
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
}


@dataclass(frozen=True)
class Run:
    """Settings of a run: the first columns of the CSV.

    Attributes:
        method: Name in ``methods.METHODS``.
        replicas: Number of replicas, one per host.
        sequences: Sequences per replica and step.
        steps: Length of the run and of its learning-rate schedule.
        seed: Seed of the model and of the order of the data.
        lr: Learning rate of the matrices.
        vector_lr: Learning rate of embeddings, output head and norms.
        rate: Speed of the links, or speed and latency, one way: ``"12mbit+25ms"``. Empty for no limit.
        disturbance: What changes in the middle of the run: ``""``, ``"lr"`` or ``"data"``.
        stop: Steps after which a timed run ends. 0 trains to the end.
        corpus: Name in ``corpora.CORPORA``.
        model: Name in ``corpora.SIZES``.
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
    corpus: str = "python"
    model: str = "131k"

    @property
    def key(self) -> tuple[str, ...]:
        """The values as the CSV has them."""
        return tuple(str(getattr(self, field.name)) for field in fields(self))


@dataclass(frozen=True)
class Outcome:
    """Results of a run: the other columns of the CSV. Bytes are per replica, the mean over all.

    Attributes:
        val_loss: Validation loss of the mean of the replicas' parameters, in nats per byte.
        sync_steps: Number of sync steps.
        payload: Bytes that the optimizer counted in steps.
        kernel_steps: Bytes that the kernel counted in steps. -1 over loopback.
        kernel_total: The same, with the consensus at the end of fit.
        seconds: Seconds of the steps.
        peak_mib: Peak of the resident memory less its value before the model was built.
        spread: Relative drift before the last consensus: norm of the replicas' distance from their mean over the norm
            of the mean. -1 if it was not measured.
        curve: ``step:loss:kernel bytes:seconds:sync steps`` of every evaluation, separated by blanks.
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
    """Text read backwards: the change of the data in disturbed runs."""

    def __init__(self, windows: Windows) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Tensor:
        return self.windows[index].flip(0)


class Disturbance(pl.Callback):
    """Changes a run in its middle.

    ``"data"``: the text runs backwards from there on. ``"lr"``: a tenth of the run has three times the learning rate.
    """

    def __init__(self, kind: str, steps: int) -> None:
        self.kind, self.start, self.end = kind, steps // 2, steps // 2 + steps // 10

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Change the batch or the learning rate before the forward pass."""
        if self.kind == "data" and batch_idx >= self.start:
            batch.copy_(batch.flip(1))
        if self.kind == "lr" and self.start <= batch_idx < self.end:
            for optimizer in trainer.optimizers:
                for group in optimizer.param_groups:
                    # The schedule sets the rate at every step.
                    group["lr"] = 3 * group["lr"]


def kernel_sent() -> int:
    """Bytes that this host has sent. -1 if the hosts share the loopback interface."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    if interface == "lo":
        return -1
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())


def resident_mib(field: str) -> float:
    """Resident memory of this process in MiB: ``VmRSS`` now, ``VmHWM`` the peak since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


class Meter(pl.Callback):
    """Counts time and bytes of the steps, and evaluates the mean of the replicas without changing a replica."""

    def __init__(self, run: Run, evaluations: int, validation: Dataset[Tensor]) -> None:
        self.every_step_syncs = METHODS[run.method].ddp
        self.last = run.stop or run.steps
        self.at = {round(run.steps * (number + 1) / evaluations) for number in range(evaluations)} - {self.last}
        self.validation = validation
        self.seconds, self.kernel, self.kernel_at_end, self.payload, self.sync_steps = 0.0, 0, 0, 0, 0
        self.loss, self.spread = float("nan"), 0.0
        self.curve: list[str] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start to count, after the first broadcast."""
        self._resume()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count, and evaluate at the chosen steps."""
        optimizer = trainer.optimizers[0]
        # Without a hook a CurvaDion reports what its trigger wanted, and communicates nothing.
        hookless = type(optimizer) is CurvaDion and optimizer.sync_hook is None
        report = None if hookless else getattr(optimizer, "last_step", None)
        self.sync_steps += report.synced if report else self.every_step_syncs
        self.payload += report.bytes_sent if report else 0
        if trainer.global_step in self.at:
            self._evaluate(trainer.global_step, cast(ByteGPT, pl_module))
            self._resume()
        elif trainer.global_step == self.last:
            # Not in on_train_end: the strategy's consensus comes before it.
            self._evaluate(trainer.global_step, cast(ByteGPT, pl_module))
            dist.barrier()
            self.kernel_at_end = kernel_sent()

    def _resume(self) -> None:
        dist.barrier()
        self._kernel, self._start = kernel_sent(), time.perf_counter()

    def _evaluate(self, step: int, module: ByteGPT) -> None:
        # The time of the slowest replica counts.
        dist.barrier()
        self.seconds += time.perf_counter() - self._start
        self.kernel += kernel_sent() - self._kernel
        # Another process of this host must have read its count before this one sends more.
        dist.barrier()
        self.loss, self.spread = consensus_loss(module, self.validation)
        self.curve.append(f"{step}:{self.loss:.5f}:{self.kernel}:{self.seconds:.3f}:{self.sync_steps}")


@torch.no_grad()
def consensus_loss(module: ByteGPT, validation: Dataset[Tensor]) -> tuple[float, float]:
    """Loss of the mean of the replicas' parameters, and the relative drift. Each replica evaluates some windows."""
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


def validation_windows(run: Run, path: Path, count: int) -> Dataset[Tensor]:
    """About ``count`` windows of the validation file, evenly spread."""
    windows = Windows(path, CONTEXT + 1, max(CONTEXT, path.stat().st_size // (count + 1)))
    return Reversed(windows) if run.disturbance == "data" else windows


def build_trainer(run: Run, meter: Meter, **launch: Any) -> pl.Trainer:
    """A Trainer for one replica of the run."""
    method = METHODS[run.method]
    options = {"num_nodes": run.replicas, "strategy": method.strategy(), **launch}
    return pl.Trainer(
        **{**QUIET, **options},
        max_steps=run.stop or run.steps,
        callbacks=[*method.callbacks(), Disturbance(run.disturbance, run.steps), meter],
    )


def train(run: Run, evaluations: int, val_sequences: int, **launch: Any) -> Outcome:
    """Train one run. Every process calls it.

    Args:
        run: Its settings.
        evaluations: How often it is evaluated.
        val_sequences: With how many windows.
        **launch: Arguments of the Trainer, where a host has several processes.
    """
    pl.seed_everything(run.seed, verbose=False)
    memory_before = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    data = CORPORA[run.corpus](context=CONTEXT, batch_size=run.sequences)
    meter = Meter(run, evaluations, validation_windows(run, data.cache / "val.bin", val_sequences))
    trainer = build_trainer(run, meter, **launch)
    optimizer = partial(METHODS[run.method].optimizer, lr=run.lr, vector_lr=run.vector_lr)
    module = ByteGPT(optimizer, *SIZES[run.model], CONTEXT, run.vector_lr)
    trainer.fit(module, data.train_dataloader())
    dist.barrier()
    total = meter.kernel + kernel_sent() - meter.kernel_at_end
    sums = torch.tensor([meter.payload, meter.kernel, total], dtype=torch.float64)
    dist.all_reduce(sums)
    payload, kernel, total = (sums / run.replicas).round().long().tolist()
    return Outcome(
        val_loss=round(meter.loss, 5),
        sync_steps=meter.sync_steps,
        payload=payload,
        kernel_steps=kernel,
        kernel_total=total,
        seconds=round(meter.seconds, 3),
        peak_mib=round(resident_mib("VmHWM") - memory_before, 1),
        spread=round(meter.spread, 5),
        curve=" ".join(meter.curve),
    )


def append(path: Path, run: Run, outcome: Outcome) -> None:
    """Add a row to the CSV, with the commit that made it."""
    row = {**asdict(run), **asdict(outcome), "commit": os.environ.get("COMPARE_COMMIT", "")}
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row.keys())
        if new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    """Train the runs of the JSON, one after another."""
    torch.set_num_threads(1)
    # Or Lightning would list the devices at every run.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # One group for all runs: a Trainer uses an initialised group.
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=10))
    job = json.loads(sys.argv[1])
    for settings in job["runs"]:
        run = Run(**settings)
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
