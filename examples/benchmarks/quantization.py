"""What quantization costs in time, what it saves in bytes, and its effect on the loss.

python examples/benchmarks/quantization.py             # speed, and share of a sync step: about two minutes
python examples/benchmarks/quantization.py --blocks    # error against block size, on displacements from training
python examples/benchmarks/quantization.py --train     # four replicas, 1500 steps, every format and period: two hours
python examples/benchmarks/quantization.py --tables    # the tables of the last --train, from results/wire.csv
python examples/benchmarks/quantization.py --smoke     # a little of everything
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

# A script has its own folder on the path, not the root of the clone.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.benchmarks import quantization_training
from examples.benchmarks.replica_training import CONTEXT, cross_entropy, on_replicas, parameter_groups
from examples.byte_gpt import GPT, StandardLibrary, Windows
from lightning_curvadion import CurvaDion, EveryNSteps, ProcessGroupSync, split_parameters
from lightning_curvadion.sync import payload_collectives, quantization, transfers
from lightning_curvadion.sync.chunks import PayloadSlice
from lightning_curvadion.sync.payload_checks import PayloadCheck
from lightning_curvadion.sync.payload_collectives import PayloadCollectives
from lightning_curvadion.sync.payloads import TensorPayload
from lightning_curvadion.sync.transfers import complete


def median_seconds(functions: list[Callable[[], object]], rounds: int) -> list[float]:
    """Median time of each function. The functions take turns; the first round is not counted."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds + 1):
        for function, seconds in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds[1:]) for seconds in times]


def print_speed(numel: int, rounds: int) -> None:
    """Print how fast one thread quantizes and dequantizes whole blocks, beside a copy."""
    torch.set_num_threads(1)
    numbers, out = torch.randn(1, numel), torch.empty(1, numel)
    payloads = {name: quantization.quantize_rows(numbers, name, numel) for name in quantization.WIRE_FORMATS[1:]}
    functions: list[Callable[[], object]] = [lambda: out.copy_(numbers)]
    for name, payload in payloads.items():
        functions.append(lambda name=name: quantization.quantize_rows(numbers, name, numel))  # type: ignore[misc]
        functions.append(lambda name=name, payload=payload: quantization.dequantize_rows(payload, name, out))  # type: ignore[misc]
    copy, *times = median_seconds(functions, rounds)
    size = numbers.nbytes / 1e9
    print(f"\n{numel / 1e6:g} M numbers, one thread, GB/s of float32 (a copy: {size / copy:.2f})\n")
    print("| format | quantize | dequantize | both | bits per number |\n| --- | --- | --- | --- | --- |")
    for number, name in enumerate(payloads):
        forth, back = times[2 * number : 2 * number + 2]
        bits = 8 * quantization.quantized_bytes(numel, name) / numel
        print(f"| {name} | {size / forth:.2f} | {size / back:.2f} | {size / (forth + back):.2f} | {bits:.3f} |")


class Stopwatch:
    """Replaces ``record_function`` and sums the seconds of each range."""

    seconds: ClassVar[Counter[str]] = Counter()

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.name] += time.perf_counter() - self.start  # type: ignore[assignment, operator]


def print_sync_step_shares(layers: int, width: int, rounds: int) -> None:
    """Print the seconds of a sync step, of its quantization and of its collectives. Every replica calls it."""
    for module in (payload_collectives, transfers):
        vars(module)["record_function"] = Stopwatch
    if dist.get_rank() == 0:
        print("\nA sync step, milliseconds (momentum=local, gloo over loopback, one thread per replica)\n")
        print("| replicas | matrices | format | step | quantization | share | collectives |\n|" + " --- |" * 7)
    for wire_format in quantization.WIRE_FORMATS:
        step, quantizing, sending = sync_step_seconds(wire_format, layers, width, rounds)
        if dist.get_rank() == 0:
            matrices = f"{layers} of {width} x {4 * width}"
            row = f"{dist.get_world_size()} | {matrices} | {wire_format} | {1e3 * step:.3f} | {1e3 * quantizing:.3f}"
            print(f"| {row} | {100 * quantizing / step:.0f} % | {1e3 * sending:.3f} |", flush=True)


def sync_step_seconds(wire_format: str, layers: int, width: int, rounds: int) -> tuple[float, ...]:
    """Median seconds of a sync step, of its quantization and of its collectives."""
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(width, 4 * width, bias=False) for _ in range(layers))
    optimizer = CurvaDion(split_parameters(model), trigger=EveryNSteps(1))
    optimizer.register_sync_hook(ProcessGroupSync(momentum="local", wire_format=wire_format))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    times = []
    for _ in range(rounds + 1):
        dist.barrier()
        Stopwatch.seconds.clear()
        start = time.perf_counter()
        optimizer.step()
        seconds = time.perf_counter() - start
        quantizing = Stopwatch.seconds["curvadion::quantize"] + Stopwatch.seconds["curvadion::dequantize"]
        times.append((seconds, quantizing, Stopwatch.seconds["curvadion::collective"]))
    return tuple(map(statistics.median, zip(*times[1:], strict=True)))


def print_collective_seconds(numel: int, rounds: int) -> None:
    """Print the time of one all-gather beside an all-to-all and an all-gather. Both replicas call it."""
    collectives = PayloadCollectives()
    collectives.join()
    for wire_format in ("int8", "int2"):
        payload = TensorPayload("numbers", torch.randn(numel), wire_format)
        slices, check = [PayloadSlice(payload, 0, numel)], PayloadCheck([payload])

        def all_gather(slices: list[PayloadSlice] = slices, check: PayloadCheck = check) -> None:
            dist.barrier()
            complete(collectives.mean_by_all_gather(slices, check))

        def all_to_all(slices: list[PayloadSlice] = slices, check: PayloadCheck = check) -> None:
            dist.barrier()
            complete(collectives.mean_by_all_to_all(slices, check))

        times = median_seconds([all_gather, all_to_all], rounds)
        if dist.get_rank() == 0:
            print(
                f"\n{numel / 1e6:g} M numbers in {wire_format} between two replicas: {times[0]:.3f} s by all-gather,"
                f" {times[1]:.3f} s by all-to-all and all-gather",
                flush=True,
            )


def displacement(steps: int) -> Tensor:
    """Displacement of one replica's parameters in the last six steps of training."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = StandardLibrary()
    data.prepare_data()
    windows = Windows(data.cache / "train.bin", CONTEXT + 1, CONTEXT)
    model = GPT(layers=4, width=96, heads=4, context=CONTEXT)
    optimizer = CurvaDion(parameter_groups(model))
    before: list[Tensor] = []
    for step in range(steps):
        if step == steps - 6:
            before = [parameter.detach().clone() for parameter in model.parameters()]
        batch = torch.stack([windows[int(i)] for i in torch.randint(len(windows), (8,))])
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()
    return torch.cat([(p.detach() - b).view(-1) for p, b in zip(model.parameters(), before, strict=True)])


def print_block_errors(steps: int) -> None:
    """Print the error of each format against the size of a block."""
    numbers = displacement(steps)
    sizes = (32, 64, 128, 256, 512)
    print(
        f"\nRelative error of the displacement over 6 steps after {steps} steps, and bits per number, by block size\n"
    )
    print("| format | " + " | ".join(map(str, sizes)) + " |\n| --- |" + " --- |" * len(sizes))
    defaults = dict(quantization.BLOCK_FORMATS)
    for name, block_format in defaults.items():
        cells = []
        for size in sizes:
            quantization.BLOCK_FORMATS[name] = replace(block_format, block=size)
            restored = quantization.dequantize(quantization.quantize(numbers, name), name, numbers.numel())
            bits = 8 * quantization.quantized_bytes(numbers.numel(), name) / numbers.numel()
            mark = "**" if size == block_format.block else ""
            cells.append(f"{mark}{(restored - numbers).norm() / numbers.norm():.4f}{mark} ({bits:.2f})")
        print(f"| {name} | " + " | ".join(cells) + " |")
    quantization.BLOCK_FORMATS.update(defaults)


def smoke() -> None:
    """A little of everything."""
    print_speed(2**18, rounds=1)
    print_block_errors(steps=8)
    with tempfile.TemporaryDirectory() as folder:
        on_replicas(2, smoke_replica, Path(folder) / "wire.csv")


def smoke_replica(csv_path: Path) -> None:
    """What needs two replicas, in the same two processes."""
    print_collective_seconds(2**18, rounds=1)
    print_sync_step_shares(layers=1, width=96, rounds=1)
    quantization_training.smoke(csv_path)


def measure_replica() -> None:
    """The full measurements of two replicas."""
    print_collective_seconds(25_000_000, rounds=5)
    print_sync_step_shares(layers=10, width=768, rounds=5)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_mutually_exclusive_group()
    for name in ("blocks", "train", "tables", "smoke"):
        modes.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args()
    if options.blocks:
        print_block_errors(steps=400)
    elif options.train or options.tables:
        if options.train:
            quantization_training.train()
        quantization_training.tables()
    elif options.smoke:
        smoke()
    else:
        print_speed(2**24, rounds=7)
        on_replicas(2, measure_replica)
        on_replicas(4, print_sync_step_shares, 10, 768, 5)


if __name__ == "__main__":
    main()
