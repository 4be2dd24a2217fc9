"""What the processes of a replica gain where each orthonormalises a part of its matrices.

    python examples/benchmarks/shared_work.py
    python examples/benchmarks/shared_work.py --smoke

Two processes of one thread are one replica. They take Muon's step on the matrices of small GPTs. In every second step
each process orthonormalises all of them.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from examples.benchmarks.replica_training import on_replicas  # noqa: E402
from lightning_curvadion import CurvaDion, ProcessGroupSync  # noqa: E402

PROCESSES = 2
# Width and layers.
MODELS = ((64, 2), (160, 4), (384, 4), (768, 2))


def matrices(width: int, layers: int) -> list[nn.Parameter]:
    """Those of attention, of which queries, keys and values lie apart, and of the MLP."""
    shapes = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    return [nn.Parameter(torch.randn(shape)) for _ in range(layers) for shape in shapes]


def time_steps(models: tuple[tuple[int, int], ...], rounds: int) -> None:
    """Print a row for each model. Both processes call it."""
    replica = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    for width, layers in models:
        torch.manual_seed(0)
        parameters = matrices(width, layers)
        optimizer = CurvaDion(parameters)
        optimizer.register_sync_hook(ProcessGroupSync(replica, inner_group=dist.group.WORLD))
        shared_work = optimizer.shared_work
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for step in range(2 * rounds):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            shares = step % 2 == 0
            optimizer.shared_work = shared_work if shares else None
            dist.barrier()
            start = time.perf_counter()
            optimizer.step()
            dist.barrier()
            seconds[shares].append(time.perf_counter() - start)
        if dist.get_rank() == 0:
            alone, shared = (1e3 * statistics.median(seconds[shares]) for shares in (False, True))
            count = sum(parameter.numel() for parameter in parameters)
            print(f"| {count:,} | {alone:.1f} | {shared:.1f} | {shared / alone:.2f} |", flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="steps of each kind")
    parser.add_argument("--smoke", action="store_true", help="a few steps of the smallest model")
    options = parser.parse_args()
    print("| numbers in matrices | alone, ms | shared, ms | shared / alone |\n" + "| --- " * 4 + "|")
    on_replicas(PROCESSES, time_steps, MODELS[:1] if options.smoke else MODELS, 2 if options.smoke else options.rounds)


if __name__ == "__main__":
    main()
