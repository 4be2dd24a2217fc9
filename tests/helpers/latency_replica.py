"""One replica of test_step_prediction.py at a latency, on a host of the network lab: steps in a row, as in training.

RANK=... WORLD_SIZE=... MASTER_ADDR=... python latency_replica.py FOLDER DELAYS_JSON NETWORK_NAMESPACE

DELAYS_JSON has, by number of replicas, pairs of lag and overlap to measure as well.
"""

import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from lab_replicas import move_to_host
from plan_replica import Stopwatch, build
from torch import nn
from torch.distributed import ProcessGroup

from lightning_curvadion import CurvaDion

# Small, so that a step is mostly communication.
SHAPE = {"layers": 2, "width": 64, "heads": 4, "context": 64}
WIRE_FORMAT = "sign"
HOOK = {"wire_format": WIRE_FORMAT, "momentum": "local"}
STEPS = 6
# What a step computes where only the agreement is measured, and the pause between steps without communication: replicas
# that wait for each other compute one after the other, and share no core.
PAUSE = 0.05
# With a lag and overlap the replicas compute at the same time, so they sleep for most of a step.
SLEEP = 0.05
# Steps from one sync step to the next, and how often.
PERIOD, PERIODS = 4, 3

Replica = tuple[nn.Module, CurvaDion]


def step(replica: Replica, fire: bool = False) -> None:
    model, optimizer = replica
    optimizer.trigger.fire = fire
    tokens = torch.randint(0, 256, (1, 65))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    optimizer.step()


def row(group: ProcessGroup, function: Callable[[], None], pause: float = 0.0) -> float:
    """Mean seconds of a step in a row of them, on the slowest replica."""
    dist.barrier(group)
    took = []
    for _ in range(2 + STEPS):  # in the first two, connections open and the replicas get into step
        start = time.perf_counter()
        function()
        took.append(time.perf_counter() - start)
        time.sleep(pause)
    return Stopwatch(group).slowest(statistics.mean(took[2:]))


def measure(group: ProcessGroup) -> dict[str, float]:
    """Mean seconds of steps in a row, by kind."""
    alone = build(None, shape=SHAPE)
    replica = build(group, {**HOOK, "lag": 0, "overlap": 0}, SHAPE)

    def agree() -> None:
        time.sleep(PAUSE)
        dist.all_reduce(torch.zeros(2, dtype=torch.float64), op=dist.ReduceOp.MAX, group=group)

    return {
        "alone": row(group, lambda: step(alone), PAUSE),
        "local": row(group, lambda: step(replica)),
        "sync": row(group, lambda: step(replica, fire=True)),
        "agreement": row(group, agree) - PAUSE,
        "quantization": Stopwatch(group).quantization(WIRE_FORMAT),
    }


def periods(group: ProcessGroup, replica: Replica, syncs: bool = False) -> float:
    """Median seconds of steps in a row, a period at a time, on the slowest replica."""
    dist.barrier(group)
    took = []
    for _ in range(1 + PERIODS):
        start = time.perf_counter()
        for number in range(PERIOD):
            time.sleep(SLEEP)
            step(replica, fire=syncs and number == 0)
        took.append((time.perf_counter() - start) / PERIOD)
    return Stopwatch(group).slowest(statistics.median(took[1:]))


def measure_delays(group: ProcessGroup, lag: int, overlap: int) -> dict[str, float]:
    """Seconds of steps without communication, of local steps, and of all where every ``PERIOD``-th synchronises."""
    alone = build(None, shape=SHAPE)
    replica = build(group, {**HOOK, "lag": lag, "overlap": overlap}, SHAPE)
    measured = {
        "alone": periods(group, alone),
        "local": periods(group, replica),
        "mean": periods(group, replica, syncs=True),
    }
    # Nothing may be under way when the process groups end.
    replica[1].sync_hook.reach_consensus(replica[1])
    return measured


def main() -> None:
    folder, delays = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    move_to_host(sys.argv[3])
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    measured = {}
    for replicas, pairs in delays.items():
        group = dist.new_group(range(int(replicas)))
        if dist.get_rank() < int(replicas):
            measured[replicas] = {**measure(group), "delays": [measure_delays(group, *pair) for pair in pairs]}
        dist.barrier()
    if dist.get_rank() == 0:
        (folder / "measured.json").write_text(json.dumps(measured))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
