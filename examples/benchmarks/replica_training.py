"""Trains the byte-level GPT on several replicas in a plain loop, one setting after another, with a CSV row for each."""

import csv
import datetime
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from examples.byte_gpt import GPT, WHOLE, StandardLibrary, Windows
from lightning_curvadion import CurvaDion, EveryNSteps, IntegratedRMMC, ProcessGroupSync, split_parameters

CONTEXT, SEQUENCES = 64, 4
LR, VECTOR_LR, WARMUP, COOLDOWN = 0.02, 0.003, 20, 0.5


@dataclass(frozen=True)
class Setting:
    """One run.

    Attributes:
        hook: Arguments of ``ProcessGroupSync``.
        period: Steps between two syncs, on average if ``triggered``.
        triggered: Whether ``IntegratedRMMC`` decides when to synchronise, with the budget that gives this rate.
        seed: Seed of the model and the data.
    """

    hook: dict[str, Any] = field(default_factory=dict)
    period: int = 1
    triggered: bool = False
    seed: int = 0

    @property
    def name(self) -> str:
        """The label of the run's row. ``results/wire.csv`` holds triggered runs as "gated"."""
        options = " ".join(f"{key}={value}" for key, value in self.hook.items())
        return f"{options}, {'gated' if self.triggered else 'period'} {self.period}, seed {self.seed}"


@dataclass(frozen=True)
class Result:
    """Columns of the CSV: loss of the consensus in nats per byte, and bytes per replica.

    ``gated_budget`` is the budget with which ``IntegratedRMMC`` would have synchronised as often in this run.
    """

    val_loss: float
    steps: int
    sync_steps: int
    bytes_sent: int
    ddp_bytes: int
    gated_budget: float
    seconds: float


def cross_entropy(model: GPT, batch: Tensor) -> Tensor:
    """Next-byte cross entropy of a batch of shape (sequences, CONTEXT + 1)."""
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def parameter_groups(model: GPT) -> list[dict[str, Any]]:
    """The groups of ``split_parameters`` with the learning rates of this benchmark."""
    groups = list(split_parameters(model, options=WHOLE))
    for group in groups:
        group["lr"] = LR if group["algorithm"] == "dion" else VECTOR_LR
    return groups


def train(setting: Setting, steps: int, budget: float | None, cache: Path, val_sequences: int) -> Result:
    """Train one run. Every replica calls it."""
    torch.manual_seed(setting.seed)
    model = GPT(layers=2, width=64, heads=4, context=CONTEXT)
    trigger = EveryNSteps(setting.period) if budget is None else IntegratedRMMC(budget)
    optimizer = CurvaDion(parameter_groups(model), lr=LR, trigger=trigger, max_local_steps=None)
    sync = ProcessGroupSync(**setting.hook)
    optimizer.register_sync_hook(sync)
    bytes_before = sync.bytes_sent
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP, (steps - step) / (COOLDOWN * steps)))

    data = Windows(cache / "train.bin", CONTEXT + 1, CONTEXT)
    order = torch.Generator().manual_seed(1000 * setting.seed + dist.get_rank())
    start, sync_steps, rmmc = time.perf_counter(), 0, []
    for _ in range(steps):
        batch = torch.stack([data[int(i)] for i in torch.randint(len(data), (SEQUENCES,), generator=order)])
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()
        schedule.step()
        assert optimizer.last_step is not None
        sync_steps += optimizer.last_step.synced
        rmmc.append(optimizer.last_step.rmmc)
    bytes_in_steps = sync.bytes_sent - bytes_before
    sync.reach_consensus(optimizer, include_state=True)
    seconds = time.perf_counter() - start

    val_loss = validation_loss(model, cache / "val.bin", val_sequences)
    ddp_bytes = steps * sum(parameter.nbytes for parameter in model.parameters())
    return Result(val_loss, steps, sync_steps, bytes_in_steps, ddp_bytes, budget_for(rmmc, sync_steps), seconds)


@torch.no_grad()
def validation_loss(model: GPT, path: Path, sequences: int) -> float:
    """Loss of the consensus. Every replica evaluates its share of the windows."""
    windows = Windows(path, CONTEXT + 1, max(CONTEXT, path.stat().st_size // (sequences + 1)))
    shard = [windows[i] for i in range(dist.get_rank(), len(windows), dist.get_world_size())]
    loss = cross_entropy(model, torch.stack(shard)).item()
    sums = torch.tensor([loss * len(shard), float(len(shard))], dtype=torch.float64)
    dist.all_reduce(sums)
    return float(sums[0] / sums[1])


def budget_for(rmmc: list[float], sync_steps: int) -> float:
    """Budget with which ``IntegratedRMMC`` synchronises so often on this sequence of RMMC, by bisection."""
    low, high = 1e-6, sum(value for value in rmmc if math.isfinite(value))
    for _ in range(40):
        budget = (low + high) / 2
        low, high = (budget, high) if count_syncs(IntegratedRMMC(budget), rmmc) > sync_steps else (low, budget)
    return high


def count_syncs(trigger: IntegratedRMMC, rmmc: list[float]) -> int:
    """Sync steps of a trigger on a sequence of RMMC."""
    syncs = 0
    for value in rmmc:
        synced = trigger.wants_sync(value)
        trigger.stepped(synced)
        syncs += synced
    return syncs


def train_missing(settings: list[Setting], steps: int, csv_path: Path, val_sequences: int = 2048) -> None:
    """Train every setting that the CSV lacks. Every replica calls it; rank 0 writes the rows.

    A triggered setting must come after the periodic one with the same rate.
    """
    rows = {row["setting"]: row for row in read(csv_path)}
    for setting in settings:
        if setting.name in rows:
            continue
        periodic = replace(setting, triggered=False).name
        budget = float(rows[periodic]["gated_budget"]) if setting.triggered else None
        result = train(setting, steps, budget, StandardLibrary().cache, val_sequences)
        row = {"setting": setting.name, "replicas": dist.get_world_size(), **asdict(result)}
        rows[setting.name] = {key: str(value) for key, value in row.items()}
        if dist.get_rank() == 0:
            append(csv_path, row)
            print(f"{setting.name}: loss {result.val_loss:.4f}, {result.seconds:.0f} s", flush=True)


def append(csv_path: Path, row: dict[str, Any]) -> None:
    """Add a row to the CSV."""
    new = not csv_path.exists()
    with csv_path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row.keys())
        if new:
            writer.writeheader()
        writer.writerow(row)


def read(csv_path: Path) -> list[dict[str, str]]:
    """Rows of the finished runs."""
    if not csv_path.exists():
        return []
    with csv_path.open(newline="") as file:
        return list(csv.DictReader(file))


def _replica(rank: int, world: int, store: str, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=datetime.timedelta(minutes=5)
    )
    function(*args)
    dist.destroy_process_group()


def on_replicas(world: int, function: Callable[..., None], *args: Any) -> None:
    """Call ``function(*args)`` in ``world`` processes that form a gloo group."""
    with tempfile.TemporaryDirectory() as folder:
        # As daemons they end with this process, which otherwise waits for them where it is interrupted.
        spawn(_replica, (world, f"{folder}/store", function, args), nprocs=world, daemon=True)
