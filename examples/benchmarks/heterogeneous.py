"""What a fast and a slow machine gain where neither waits for the other's steps.

    python examples/benchmarks/heterogeneous.py
    python examples/benchmarks/heterogeneous.py --smoke

Two replicas train the byte-level GPT. Every step of replica 0 is filled up with sleep to 40 ms, and every step of
replica 1 to 80 ms. The ways take turns, one run of each a seed: in lock-step, and with ``heterogeneous=True``. All see
as many samples: a run ends when the mean of the replicas' steps has reached ``--steps``.
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from examples.benchmarks.replica_training import CONTEXT, cross_entropy, on_replicas, validation_loss  # noqa: E402
from examples.benchmarks.step_time import processor  # noqa: E402
from examples.byte_gpt import GPT, WHOLE, StandardLibrary, Windows, warmup_and_cooldown  # noqa: E402
from lightning_curvadion import CurvaDion, ProcessGroupSync, split_parameters  # noqa: E402

LOCK_STEP = "lock-step, the defaults"
WAYS: dict[str, dict[str, Any]] = {
    LOCK_STEP: {},
    "heterogeneous": {"heterogeneous": True},
    "heterogeneous, overlap 0": {"heterogeneous": True, "overlap": 0},
}
# Of a step of each replica.
SECONDS = (0.04, 0.08)
LR, VECTOR_LR, SEQUENCES = 0.016, 0.024, 4


@dataclass
class Run:
    """A run: steps a second of both replicas together, what each has taken, the share of sync steps, and the loss."""

    speed: float
    steps: list[int]
    syncs: float
    loss: float


def train(options: dict[str, Any], total: int, seed: int, seconds: tuple[float, ...], val_sequences: int) -> Run:
    """Train one run. Every replica calls it."""
    torch.manual_seed(seed)
    model = GPT(layers=2, width=64, heads=4, context=CONTEXT)
    groups = split_parameters(model, options={"adamw": {"lr": VECTOR_LR}, **WHOLE})
    optimizer = CurvaDion(groups, lr=LR)
    optimizer.register_sync_hook(sync := ProcessGroupSync(**options))
    cache = StandardLibrary().cache
    data = Windows(cache / "train.bin", CONTEXT + 1, CONTEXT)
    order = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
    steps, syncs = 0, 0

    def done() -> float:
        return sync.global_step if options else steps

    schedule = LambdaLR(optimizer, lambda _: warmup_and_cooldown(int(done()), total))
    dist.barrier()
    start = time.perf_counter()
    # Of the last step of the optimizer: what it waits for the other replica does not count.
    busy = 0.0
    while done() < total:
        start_of_step = time.perf_counter() - busy
        batch = torch.stack([data[int(i)] for i in torch.randint(len(data), (SEQUENCES,), generator=order)])
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        time.sleep(max(0.0, seconds[dist.get_rank()] - (time.perf_counter() - start_of_step)))
        start_busy = time.thread_time()
        optimizer.step()
        busy = time.thread_time() - start_busy
        steps += 1
        schedule.step()
        assert optimizer.last_step is not None
        syncs += optimizer.last_step.synced
    sync.reach_consensus(optimizer)
    elapsed = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
    taken = [torch.tensor(0) for _ in range(dist.get_world_size())]
    dist.all_gather(taken, torch.tensor(steps))
    of_each = [int(own) for own in taken]
    loss = validation_loss(model, cache / "val.bin", val_sequences)
    return Run(sum(of_each) / float(elapsed), of_each, syncs / min(of_each), loss)


def compare(rounds: int, total: int, seconds: tuple[float, ...], val_sequences: int) -> None:
    """Print a row for each way. Every replica calls it."""
    runs: dict[str, list[Run]] = {way: [] for way in WAYS}
    # The first steps of a process take longer.
    train({}, 3, 0, seconds, val_sequences)
    for seed in range(rounds):
        for way, options in WAYS.items():
            runs[way].append(train(options, total, seed, seconds, val_sequences))
    if dist.get_rank() == 0:
        for way, own in runs.items():
            speed, syncs, loss = (
                statistics.median(getattr(run, key) for run in own) for key in ("speed", "syncs", "loss")
            )
            ratio = statistics.median(run.speed / base.speed for run, base in zip(own, runs[LOCK_STEP], strict=True))
            spread = (max(run.loss for run in own) - min(run.loss for run in own)) / 2
            steps = " + ".join(
                f"{statistics.median(each):.0f}" for each in zip(*(run.steps for run in own), strict=True)
            )
            print(f"| {way} | {steps} | {speed:.1f} | {ratio:.2f} | {100 * syncs:.0f} % | {loss:.4f} ± {spread:.4f} |")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way, with a seed each")
    parser.add_argument("--steps", type=int, default=400, help="of a run, as the mean of the replicas")
    parser.add_argument("--smoke", action="store_true", help="one short run of each way")
    options = parser.parse_args()
    StandardLibrary().prepare_data()
    print(f"{processor()}; {len(SECONDS)} replicas, steps of {' and '.join(f'{1e3 * s:.0f} ms' for s in SECONDS)}\n")
    print("| way | steps of each | steps/s of both | of lock-step | sync steps | loss |\n" + "| --- " * 6 + "|")
    if options.smoke:
        on_replicas(len(SECONDS), compare, 1, 12, SECONDS, 16)
    else:
        on_replicas(len(SECONDS), compare, options.rounds, options.steps, SECONDS, 2048)


if __name__ == "__main__":
    main()
