"""What coding costs, what it saves, and what it does to the loss.

python examples/benchmarks/quantization.py             # speed of coding, bytes, share of a sync step: about two minutes
python examples/benchmarks/quantization.py --blocks    # error against block size, on displacements from training
python examples/benchmarks/quantization.py --train     # four replicas, 1500 steps, every format and period: about two hours
python examples/benchmarks/quantization.py --tables    # the tables of the last --train, from results/wire.csv
python examples/benchmarks/quantization.py --smoke     # a little of everything, to see that it runs
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

# Run as a script, this file's folder is on the path and the root of the clone is not.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lightning_curvadion.sync.collectives
from examples.benchmarks import quantization_training
from examples.benchmarks.replica_training import CONTEXT, LR, VECTOR_LR, loss
from examples.byte_gpt import GPT, StandardLibrary, Windows
from lightning_curvadion import CurvaDion, EveryNSteps, ProcessGroupSync, split_parameters
from lightning_curvadion.sync import quantization
from lightning_curvadion.sync.chunks import PayloadSlice
from lightning_curvadion.sync.collectives import Collectives
from lightning_curvadion.sync.payloads import TensorPayload


def median_seconds(functions: list[Callable[[], object]], rounds: int) -> list[float]:
    """Median time of each function, called in turn."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds + 1):
        for function, seen in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            seen.append(time.perf_counter() - start)
    return [statistics.median(seen[1:]) for seen in times]


def speed(numel: int, rounds: int) -> None:
    """Encode and decode on one thread, beside a copy."""
    torch.set_num_threads(1)
    numbers, out = torch.randn(numel), torch.empty(numel)
    payloads = {name: quantization.quantize_unchecked(numbers, name) for name in quantization.WIRE_FORMATS[1:]}
    functions: list[Callable[[], object]] = [lambda: out.copy_(numbers)]
    for name, payload in payloads.items():
        functions.append(lambda name=name: quantization.quantize_unchecked(numbers, name))  # type: ignore[misc]
        functions.append(lambda name=name, payload=payload: quantization.dequantize(payload, name, numel, out=out))  # type: ignore[misc]
    copy, *times = median_seconds(functions, rounds)
    size = numbers.nbytes / 1e9
    print(f"\n{numel / 1e6:g} M numbers, one thread, GB/s of float32 (a copy: {size / copy:.2f})\n")
    print("| format | encode | decode | both | bits a number |\n| --- | --- | --- | --- | --- |")
    for number, name in enumerate(payloads):
        encode, decode = times[2 * number : 2 * number + 2]
        bits = 8 * quantization.quantized_bytes(numel, name) / numel
        print(f"| {name} | {size / encode:.2f} | {size / decode:.2f} | {size / (encode + decode):.2f} | {bits:.3f} |")


def _replica(rank: int, world: int, store: str, calls: tuple[tuple[str, int, int], ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for function, size, rounds in calls:
        {"share": _share, "two_ways": _two_ways}[function](size, rounds)
    dist.destroy_process_group()


def on_replicas(world: int, *calls: tuple[str, int, int]) -> None:
    """Call functions below in ``world`` processes, each with its size and rounds."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_replica, (world, f"{folder}/store", calls), nprocs=world)


class Stopwatch:
    """Stands in for ``record_function`` and adds up the seconds of each range."""

    seconds: ClassVar[Counter[str]] = Counter()

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.name] += time.perf_counter() - self.start  # type: ignore[assignment, operator]


def _share(layers: int, rounds: int) -> None:
    """Seconds of a sync step by what it does, in the ranges that a profiler would show."""
    vars(lightning_curvadion.sync.collectives)["record_function"] = Stopwatch
    if dist.get_rank() == 0:
        print("\nA sync step, seconds (momentum=local, gloo over loopback, one thread a replica)\n")
        print("| replicas | matrices | format | step | coding | share | collectives |\n|" + " --- |" * 7)
    for wire_format in quantization.WIRE_FORMATS:
        torch.manual_seed(0)
        model = nn.ModuleList(nn.Linear(768, 3072, bias=False) for _ in range(layers))
        optimizer = CurvaDion(split_parameters(model), trigger=EveryNSteps(1))
        optimizer.register_sync_hook(ProcessGroupSync(momentum="local", wire_format=wire_format))
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        steps, coding_times, sending_times = [], [], []
        for _ in range(rounds + 1):
            dist.barrier()
            Stopwatch.seconds.clear()
            start = time.perf_counter()
            optimizer.step()
            steps.append(time.perf_counter() - start)
            coding_times.append(Stopwatch.seconds["curvadion::quantize"] + Stopwatch.seconds["curvadion::dequantize"])
            sending_times.append(Stopwatch.seconds["curvadion::collective"])
        step, coding, sending = (statistics.median(times[1:]) for times in (steps, coding_times, sending_times))
        if dist.get_rank() == 0:
            row = f"{dist.get_world_size()} | {layers} of 768 x 3072 | {wire_format} | {step:.2f} | {coding:.2f}"
            print(f"| {row} | {100 * coding / step:.0f} % | {sending:.2f} |", flush=True)


def _two_ways(numel: int, rounds: int) -> None:
    """Between two replicas: one all-gather, or an all-to-all of shards and an all-gather of their means."""
    collectives = Collectives()
    collectives.join()
    for wire_format in ("int8", "int2"):
        slices = [PayloadSlice(TensorPayload("numbers", torch.randn(numel), wire_format), 0, numel)]

        def directly(slices: list[PayloadSlice] = slices) -> None:
            dist.barrier()
            collectives.average_by_all_gather(slices)

        def in_shards(slices: list[PayloadSlice] = slices) -> None:
            dist.barrier()
            collectives.average_by_all_to_all(slices)

        times = median_seconds([directly, in_shards], rounds)
        if dist.get_rank() == 0:
            print(
                f"\n{numel / 1e6:g} M numbers in {wire_format} between two replicas: {times[0]:.3f} s directly,"
                f" {times[1]:.3f} s in shards",
                flush=True,
            )


def displacements(steps: int) -> Tensor:
    """What one replica's parameters move in the last six of some steps of training."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = StandardLibrary()
    data.prepare_data()
    windows = Windows(data.cache / "train.bin", CONTEXT + 1, CONTEXT)
    model = GPT(layers=4, width=96, heads=4, context=CONTEXT)
    groups = split_parameters(model)
    for group in groups:
        group["lr"] = LR if group["algorithm"] == "dion" else VECTOR_LR
    optimizer = CurvaDion(groups)
    before: list[Tensor] = []
    for step in range(steps):
        if step == steps - 6:
            before = [parameter.detach().clone() for parameter in model.parameters()]
        chosen = torch.randint(len(windows), (8,))
        optimizer.zero_grad()
        loss(model, torch.stack([windows[int(i)] for i in chosen])).backward()
        optimizer.step()
    return torch.cat([(p.detach() - b).view(-1) for p, b in zip(model.parameters(), before, strict=True)])


def blocks(steps: int) -> None:
    """Error of one coding against the size of a block."""
    numbers = displacements(steps)
    sizes = (32, 64, 128, 256, 512)
    print(f"\nRelative error of the displacement over 6 steps after {steps} steps, and bits a number, by block\n")
    print("| format | " + " | ".join(map(str, sizes)) + " |\n| --- |" + " --- |" * len(sizes))
    chosen = dict(quantization.BLOCK_FORMATS)
    for name, coding in chosen.items():
        cells = []
        for size in sizes:
            quantization.BLOCK_FORMATS[name] = replace(coding, block=size)
            decoded = quantization.dequantize(quantization.quantize(numbers, name), name, numbers.numel())
            bits = 8 * quantization.quantized_bytes(numbers.numel(), name) / numbers.numel()
            mark = "**" if size == coding.block else ""
            cells.append(f"{mark}{(decoded - numbers).norm() / numbers.norm():.4f}{mark} ({bits:.2f})")
        print(f"| {name} | " + " | ".join(cells) + " |")
    quantization.BLOCK_FORMATS.update(chosen)


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    for name in ("blocks", "train", "tables", "smoke"):
        what.add_argument(f"--{name}", action="store_true")
    arguments = parser.parse_args()
    if arguments.blocks:
        blocks(steps=400)
    elif arguments.train:
        quantization_training.train()
        quantization_training.tables()
    elif arguments.tables:
        quantization_training.tables()
    elif arguments.smoke:
        speed(2**18, rounds=1)
        on_replicas(2, ("two_ways", 2**18, 1), ("share", 1, 1))
        blocks(steps=8)
        with tempfile.TemporaryDirectory() as folder:
            quantization_training.smoke(Path(folder) / "wire.csv")
    else:
        speed(25_000_000, rounds=7)
        on_replicas(2, ("two_ways", 25_000_000, 5), ("share", 10, 5))
        on_replicas(4, ("share", 10, 5))


if __name__ == "__main__":
    main()
