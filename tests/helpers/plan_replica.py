"""One replica of test_plan.py, on its own host of the lab: how long steps really take at each link speed.

python plan_replica.py FOLDER RATES_JSON NETWORK_NAMESPACE_OF_THE_TEST
"""

import datetime
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from examples.byte_gpt import GPT
from lightning_curvadion import CurvaDion, ProcessGroupSync, split_parameters
from lightning_curvadion.cli.plan.benchmark import coding_seconds
from lightning_curvadion.optim.triggers import Trigger

SHAPE = {"layers": 4, "width": 144, "heads": 4, "context": 64}
HOOKS = {
    "defaults": {"wire_format": "sign", "momentum": "local"},
    "int8": {"wire_format": "int8", "momentum": "local"},
}
ROUNDS = 2
# Kinds of steps in turn, so that other work on the machine meets all alike.
STEPS = [*("alone", "local", "defaults") * 3, "int8", "alone", "local", "ddp"]


class Told(Trigger):
    """Synchronises when it was told to."""

    told = False

    def wants_sync(self, rmmc: float) -> bool:
        return self.told


def shorten_windows(outside: str) -> None:
    """Have TCP keep no more on its way than these links need.

    By its defaults megabytes wait in front of a slow link, and acknowledgements of the other direction behind them, so
    that a collective takes up to a fifth longer, now and then. That is no matter of the plan's formulas.
    """
    assert os.readlink("/proc/self/ns/net") != outside, "only in a host of the lab"
    for name in ("tcp_rmem", "tcp_wmem"):
        Path("/proc/sys/net/ipv4", name).write_text("4096 65536 65536")


def build(hook: dict | None = None) -> tuple[nn.Module, CurvaDion]:
    torch.manual_seed(0)
    model = GPT(**SHAPE)
    optimizer = CurvaDion(split_parameters(model), trigger=Told(), max_local_steps=None)
    if hook is not None:
        optimizer.register_sync_hook(ProcessGroupSync(**hook))
    return model, optimizer


def step_seconds(model: nn.Module, optimizer: Optimizer) -> float:
    """Of the slowest replica, from a common start."""
    tokens = torch.randint(0, 256, (1, 65))
    dist.barrier()
    start = time.perf_counter()
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    optimizer.step()
    return slowest(time.perf_counter() - start)


def slowest(seconds: float) -> float:
    longest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return longest.item()


def agreement_seconds() -> float:
    signal = torch.zeros(2, dtype=torch.float64)
    dist.barrier()
    start = time.perf_counter()
    dist.all_reduce(signal, op=dist.ReduceOp.MAX)
    return slowest(time.perf_counter() - start)


def ask_for(rate: str, turn: int, folder: Path) -> None:
    """Have the test change the speed of all links."""
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / "asked").write_text(f"{turn} {rate}")
    while not (folder / f"changed{turn}").exists():
        time.sleep(0.02)
    dist.barrier()


def measured(folder: Path, rates: list[str]) -> dict[str, dict[str, list[float]]]:
    """Seconds of each kind of step, and of parts of them, by rate."""
    contenders = {name: build(hook) for name, hook in HOOKS.items()}
    contenders["alone"] = build()
    contenders["local"] = contenders["defaults"]
    model, optimizer = build()
    contenders["ddp"] = DistributedDataParallel(model), optimizer

    def step(kind: str) -> float:
        model, optimizer = contenders[kind]
        optimizer.trigger.told = kind in HOOKS
        return step_seconds(model, optimizer)

    for kind in [*contenders] * 2:
        step(kind)  # connections are opened, buckets rebuilt
    by_rate: dict[str, dict[str, list[float]]] = {rate: {} for rate in rates}
    for turn in range(ROUNDS * len(rates)):
        rate = rates[turn % len(rates)]
        ask_for(rate, turn, folder)
        taken = by_rate[rate]
        for kind in STEPS:
            taken.setdefault(kind, []).append(step(kind))
        taken.setdefault("agreement", []).extend(agreement_seconds() for _ in range(10))
        for name in ("sign", "int8"):
            dist.barrier()
            taken.setdefault(f"coding {name}", []).append(slowest(coding_seconds(name, torch.device("cpu"))))
    return by_rate


def main() -> None:
    folder, rates = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    shorten_windows(outside=sys.argv[3])
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    # In a function of its own: DDP must be gone before the process group is, or the process does not end.
    by_rate = measured(folder, rates)
    first = dist.get_rank() == 0
    dist.destroy_process_group()
    if first:
        (folder / "measured.json").write_text(json.dumps(by_rate))


if __name__ == "__main__":
    main()
