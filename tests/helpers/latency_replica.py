"""One replica of test_step_prediction.py at a latency, on a host of the network lab: steps in a row, as in training.

RANK=... WORLD_SIZE=... MASTER_ADDR=... python latency_replica.py FOLDER REPLICAS_JSON NETWORK_NAMESPACE
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
from plan_replica import Stopwatch, build, move_to_host
from torch import nn
from torch.distributed import ProcessGroup

# Small, so that a step is mostly communication.
SHAPE = {"layers": 2, "width": 64, "heads": 4, "context": 64}
WIRE_FORMAT = "sign"
STEPS = 6
# What a step computes where only the agreement is measured, and the pause between steps without communication: replicas
# that wait for each other compute one after the other, and share no core.
PAUSE = 0.05


def measure(group: ProcessGroup) -> dict[str, float]:
    """Mean seconds of steps in a row, by kind, on the slowest replica."""
    stopwatch = Stopwatch(group)
    replica = build(group, {"wire_format": WIRE_FORMAT, "momentum": "local"}, SHAPE)
    contenders = {"alone": build(None, shape=SHAPE), "local": replica, "sync": replica}

    def step(kind: str) -> None:
        model, optimizer = contenders[kind]
        optimizer.trigger.fire = kind == "sync"
        tokens = torch.randint(0, 256, (1, 65))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()

    def agree() -> None:
        time.sleep(PAUSE)
        dist.all_reduce(torch.zeros(2, dtype=torch.float64), op=dist.ReduceOp.MAX, group=group)

    def row(function: Callable[[], None], pause: float = 0.0) -> float:
        dist.barrier(group)
        took = []
        for _ in range(2 + STEPS):  # in the first two, connections open and the replicas get into step
            start = time.perf_counter()
            function()
            took.append(time.perf_counter() - start)
            time.sleep(pause)
        return stopwatch.slowest(statistics.mean(took[2:]))

    return {
        "alone": row(lambda: step("alone"), PAUSE),
        "local": row(lambda: step("local")),
        "sync": row(lambda: step("sync")),
        "agreement": row(agree) - PAUSE,
        "quantization": stopwatch.quantization(WIRE_FORMAT),
    }


def main() -> None:
    folder, counts = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    move_to_host(sys.argv[3])
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    measured = {}
    for replicas in counts:
        group = dist.new_group(range(replicas))
        if dist.get_rank() < replicas:
            measured[replicas] = measure(group)
        dist.barrier()
    if dist.get_rank() == 0:
        (folder / "measured.json").write_text(json.dumps(measured))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
