"""Trains the byte-level GPT on several real replicas in a plain loop, one setting after another, a CSV row each."""

import csv
import datetime
import math
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F

from examples.byte_gpt import GPT, StandardLibrary, Windows
from lightning_curvadion import CurvaDion, EveryNSteps, IntegratedRMMC, ProcessGroupSync, split_parameters

CONTEXT, SEQUENCES = 64, 4
LR, VECTOR_LR, WARMUP, COOLDOWN = 0.02, 0.003, 20, 0.5


@dataclass(frozen=True)
class Setting:
    """One run.

    Attributes:
        hook: Arguments of ``ProcessGroupSync``.
        period: Steps between two syncs; with ``gated`` their average.
        gated: Whether ``IntegratedRMMC`` places the syncs, with the budget that gives the same rate.
        seed: Of the model and the data.
    """

    hook: dict[str, Any] = field(default_factory=dict)
    period: int = 1
    gated: bool = False
    seed: int = 0

    @property
    def name(self) -> str:
        """What distinguishes the run, for the table."""
        options = " ".join(f"{key}={value}" for key, value in self.hook.items())
        return f"{options}, {'gated' if self.gated else 'period'} {self.period}, seed {self.seed}"


@dataclass(frozen=True)
class Result:
    """What a run came to: loss of the consensus in nats a byte, and the payload of a replica.

    ``gated_budget`` is that of the ``IntegratedRMMC`` that would have synchronised as often on the RMMC of this run.
    """

    val_loss: float
    steps: int
    sync_steps: int
    bytes_sent: int
    ddp_bytes: int
    gated_budget: float
    seconds: float


def train(setting: Setting, steps: int, budget: float | None, cache: Path, val_sequences: int) -> Result:
    """One run, called by every replica."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(setting.seed)
    model = GPT(layers=2, width=64, heads=4, context=CONTEXT)
    groups = split_parameters(model)
    for group in groups:
        group["lr"] = LR if group["algorithm"] == "dion" else VECTOR_LR
    trigger = EveryNSteps(setting.period) if budget is None else IntegratedRMMC(budget)
    optimizer = CurvaDion(groups, lr=LR, trigger=trigger, max_local_steps=None)
    sync = ProcessGroupSync(**setting.hook)
    optimizer.register_sync_hook(sync)
    before = sync.bytes_sent
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP, (steps - step) / (COOLDOWN * steps))
    )

    data = Windows(cache / "train.bin", CONTEXT + 1, CONTEXT)
    order = torch.Generator().manual_seed(1000 * setting.seed + rank)
    start, synced, seen = time.perf_counter(), 0, []
    for _ in range(steps):
        batch = torch.stack([data[int(i)] for i in torch.randint(len(data), (SEQUENCES,), generator=order)])
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
        schedule.step()
        report = optimizer.last_step
        assert report is not None
        synced += report.synced
        seen.append(report.rmmc)
    in_steps = sync.bytes_sent - before
    sync.reach_consensus(optimizer, include_state=True)
    seconds = time.perf_counter() - start

    size = (cache / "val.bin").stat().st_size
    validation = Windows(cache / "val.bin", CONTEXT + 1, max(CONTEXT, size // (val_sequences + 1)))
    with torch.no_grad():
        mine = [validation[i] for i in range(rank, len(validation), world)]
        total = torch.tensor([loss(model, torch.stack(mine)).item() * len(mine), float(len(mine))], dtype=torch.float64)
    dist.all_reduce(total)
    ddp_bytes = steps * sum(parameter.nbytes for parameter in model.parameters())
    val_loss = float(total[0] / total[1])
    return Result(val_loss, steps, synced, in_steps, ddp_bytes, gated_budget(seen, synced), seconds)


def gated_budget(seen: list[float], syncs: int) -> float:
    """Budget with which ``IntegratedRMMC`` synchronises so often on this sequence of RMMC, by bisection."""
    low, high = 1e-6, sum(rmmc for rmmc in seen if math.isfinite(rmmc))
    for _ in range(40):
        budget = (low + high) / 2
        trigger = IntegratedRMMC(budget)
        low, high = (budget, high) if sum(map(decision, repeat(trigger), seen)) > syncs else (low, budget)
    return high


def decision(trigger: IntegratedRMMC, rmmc: float) -> bool:
    """One step of a trigger without an optimizer."""
    synced = trigger.wants_sync(rmmc)
    trigger.stepped(synced)
    return synced


def loss(model: GPT, batch: Tensor) -> Tensor:
    """Next-byte cross entropy of a batch of shape (sequences, CONTEXT + 1)."""
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def _replica(
    rank: int, world: int, store: str, settings: list[Setting], steps: int, csv_path: Path, cache: Path
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=datetime.timedelta(minutes=5)
    )
    done = {row["setting"]: row for row in read(csv_path)}
    for setting in settings:
        if setting.name in done:
            continue
        budget = None
        if setting.gated:
            budget = float(done[replace(setting, gated=False).name]["gated_budget"])
        result = train(setting, steps, budget, cache, val_sequences=2048)
        row = {"setting": setting.name, "replicas": world, **asdict(result)}
        done[setting.name] = {key: str(value) for key, value in row.items()}
        if rank == 0:
            new = not csv_path.exists()
            with csv_path.open("a", newline="") as file:
                writer = csv.DictWriter(file, row.keys())
                if new:
                    writer.writeheader()
                writer.writerow(row)
            print(f"{setting.name}: loss {result.val_loss:.4f}, {result.seconds:.0f} s", flush=True)
    dist.destroy_process_group()


def read(csv_path: Path) -> list[dict[str, str]]:
    """Rows of the runs that are done."""
    if not csv_path.exists():
        return []
    with csv_path.open(newline="") as file:
        return list(csv.DictReader(file))


def run(settings: list[Setting], world: int, steps: int, csv_path: Path) -> list[dict[str, str]]:
    """Train every setting that the CSV lacks, in ``world`` processes, and return all rows.

    A gated setting must come after its periodic twin.
    """
    data = StandardLibrary()
    data.prepare_data()
    csv_path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        spawn(_replica, (world, f"{folder}/store", settings, steps, csv_path, data.cache), nprocs=world)
    return read(csv_path)
