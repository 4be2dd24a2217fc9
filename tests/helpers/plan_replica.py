"""One replica of test_step_prediction.py, on a host of the network lab: measures steps at each link speed.

RANK=... WORLD_SIZE=... MASTER_ADDR=... python plan_replica.py FOLDER RATES_JSON REPLICAS_JSON NETWORK_NAMESPACE
"""

import datetime
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from lab_replicas import move_to_host
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from examples.byte_gpt import GPT
from lightning_curvadion import CurvaDion, ProcessGroupSync, split_parameters
from lightning_curvadion.cli.plan.benchmark import measure_quantization
from lightning_curvadion.optim.triggers import Trigger

SHAPE = {"layers": 4, "width": 144, "heads": 4, "context": 64}
HOOKS = {
    "defaults": {"wire_format": "sign", "momentum": "local"},
    "int8": {"wire_format": "int8", "momentum": "local"},
}
# Kinds of steps in turn, so that other work on the machine slows all kinds equally.
STEPS = [*(*("alone", "local", "defaults") * 3, "int8") * 2, "ddp"]


class ManualTrigger(Trigger):
    """Synchronises when ``fire`` is set."""

    fire = False

    def wants_sync(self, rmmc: float) -> bool:
        return self.fire


def shorten_tcp_windows() -> None:
    """Limit the data that TCP has on its way to what these links need.

    With the defaults megabytes queue in front of a slow link, and acknowledgements of the other direction behind them.
    A collective then sometimes takes up to a fifth longer, which the plan's formulas do not model.
    """
    for name in ("tcp_rmem", "tcp_wmem"):
        Path("/proc/sys/net/ipv4", name).write_text("4096 65536 65536")


def build(
    group: ProcessGroup | None, hook: dict | None = None, shape: dict[str, int] = SHAPE
) -> tuple[nn.Module, CurvaDion]:
    torch.manual_seed(0)
    model = GPT(**shape)
    optimizer = CurvaDion(split_parameters(model), trigger=ManualTrigger(), max_local_steps=None)
    if hook is not None:
        optimizer.register_sync_hook(ProcessGroupSync(group, **hook))
    return model, optimizer


@dataclass
class Stopwatch:
    """Seconds of the slowest replica of a group, from a common start."""

    group: ProcessGroup | None

    def slowest(self, seconds: float) -> float:
        longest = torch.tensor(seconds, dtype=torch.float64)
        dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=self.group)
        return longest.item()

    def step(self, model: nn.Module, optimizer: Optimizer) -> float:
        tokens = torch.randint(0, 256, (1, 65))
        dist.barrier(self.group)
        start = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        return self.slowest(time.perf_counter() - start)

    def agreement(self) -> float:
        signal = torch.zeros(2, dtype=torch.float64)
        dist.barrier(self.group)
        start = time.perf_counter()
        dist.all_reduce(signal, op=dist.ReduceOp.MAX, group=self.group)
        return self.slowest(time.perf_counter() - start)

    def quantization(self, wire_format: str) -> float:
        dist.barrier(self.group)
        return self.slowest(measure_quantization(wire_format, torch.device("cpu")))


def request_rate(rate: str, folder: Path, group: ProcessGroup | None) -> None:
    """Have the test change the speed of all links, and wait for it."""
    change = f"{rate}-{dist.get_world_size(group)}"
    dist.barrier(group)
    if dist.get_rank() == 0:
        (folder / "requested").write_text(change)
    while not (folder / f"changed-{change}").exists():
        time.sleep(0.02)
    dist.barrier(group)


def measure(folder: Path, rates: list[str], group: ProcessGroup | None) -> dict[str, dict[str, list[float]]]:
    """Seconds of each kind of step, and of parts of them, by rate."""
    stopwatch = Stopwatch(group)
    request_rate("unlimited", folder, group)
    contenders = {name: build(group, hook) for name, hook in HOOKS.items()}
    contenders["alone"] = build(group)
    contenders["local"] = contenders["defaults"]
    model, optimizer = build(group)
    contenders["ddp"] = DistributedDataParallel(model, process_group=group), optimizer

    def step(kind: str) -> float:
        model, optimizer = contenders[kind]
        optimizer.trigger.fire = kind in HOOKS
        return stopwatch.step(model, optimizer)

    for kind in [*contenders] * 2:
        step(kind)  # opens connections and rebuilds DDP's buckets
    # The network has no part in it, so that it is the same at every rate.
    quantization = {
        f"quantization {name}": [stopwatch.quantization(name) for _ in range(3)] for name in ("sign", "int8")
    }
    by_rate: dict[str, dict[str, list[float]]] = {rate: {} for rate in rates}
    for rate, seconds in by_rate.items():
        request_rate(rate, folder, group)
        for kind in STEPS:
            seconds.setdefault(kind, []).append(step(kind))
        seconds["agreement"] = [stopwatch.agreement() for _ in range(20)]
        seconds.update(quantization)
    return by_rate


def main() -> None:
    folder, rates, counts = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    move_to_host(sys.argv[4])
    shorten_tcp_windows()
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank, measured = dist.get_rank(), {}
    for replicas in counts:
        group = dist.new_group(range(replicas))
        if rank < replicas:
            # In a function of its own: the process does not end if DDP outlives the process group.
            measured[replicas] = measure(folder, rates, group)
        dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        (folder / "measured.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
