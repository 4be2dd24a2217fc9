"""What we cannot run: GPTs of 160 million to 8 billion parameters on 8 to 1024 replicas, by the plan's formulas.

    python examples/benchmarks/scaling.py

Nothing here is measured but the sync rate, on a small model; the rest is what ``lightning_curvadion/costs.py`` says,
which ``tests/test_plan.py`` holds beside two and four real replicas. The models are built without memory.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

# Run as a script, this file's folder is on the path and the root of the clone is not.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.byte_gpt import GPT
from lightning_curvadion import CurvaDion, split_parameters
from lightning_curvadion.cli.plan.collective_costs import Link, Network
from lightning_curvadion.cli.plan.footprint import every_step_traffic, footprint_of
from lightning_curvadion.cli.plan.step_prediction import Prediction, expected_sync_rate
from lightning_curvadion.sync.quantization import WIRE_FORMATS
from lightning_curvadion.trainer.strategy import CurvaDionStrategy

VOCABULARY, CONTEXT = 50_304, 1024
# Layers, width and heads.
MODELS = {"160 M": (12, 768, 12), "1.3 B": (22, 2048, 16), "8 B": (38, 4096, 32)}
REPLICAS = (8, 64, 1024)
# By name: a link within a data centre, and two between sites; latencies are of one message, one way.
LINKS = {
    "25 Gbit/s, 50 µs": Link(25e9, 50e-6),
    "1 Gbit/s, 50 ms": Link(1e9, 50e-3),
    "200 Mbit/s, 50 ms": Link(200e6, 50e-3),
}
TOKENS = 65_536
PEAK, UTILISATION = 989e12, 0.4
# An exchange moves some 100 bytes a number through the memory of an H100, 3.35 TB/s, of which half is reached.
CODING = 100 / (0.5 * 3.35e12)
_DAY = 86_400

ASSUMPTIONS = f"""\
Assumed, not measured: {TOKENS:,} tokens a replica and step, 6 FLOPs a token and parameter, {UTILISATION:.0%} of an
H100's dense bf16 peak of {PEAK / 1e12:.0f} TFLOP/s; a link of that speed and latency (of a message, one way) for every
replica; NCCL, rings or trees, whichever is quicker; gradients and state in float32; DDP reduces buckets of 25 MiB
while backward runs, 2/3 of a step; ours, the strategy's defaults, overlaps nothing; coding moves 100 bytes a number
at half of 3.35 TB/s; the sync rate of our small runs, {{rate:.1%}}, though nobody has measured how it moves with size.
Seconds a step. "over DDP" is how many times as fast; "over Dion": beside float32 factors at every step. Bytes are what
a replica sends. Left out for all alike is the optimizer's own step, though ours is no AdamW: CurvaDion's local step
took 3.1 to 3.6 times as long as AdamW's on a CPU (examples/benchmarks/step_time.py)."""


def compute_seconds(model: nn.Module) -> float:
    """Forward and backward pass of a replica; the embedding is looked up and multiplies nothing."""
    multiplying = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("embedding"))
    return 6 * multiplying * TOKENS / (UTILISATION * PEAK)


def predictions(rate: float) -> Iterator[tuple[str, str, Prediction]]:
    """Each model on each link with each number of replicas."""
    settings = CurvaDionStrategy().sync.settings
    for name, (layers, width, heads) in MODELS.items():
        with torch.device("meta"):
            model = GPT(layers, width, heads, CONTEXT, VOCABULARY)
        optimizer = CurvaDion(split_parameters(model))
        # An all-reduce is of the same buffer however many replicas there are; coded shards are not.
        dion = every_step_traffic(model, optimizer, REPLICAS[0])
        sizes = {replicas: footprint_of(model, optimizer, settings, replicas) for replicas in REPLICAS}
        coding = dict.fromkeys(WIRE_FORMATS, CODING)
        for link_name, link in LINKS.items():
            for replicas in REPLICAS:
                network = Network(link, replicas, "nccl")
                plan = Prediction(sizes[replicas], dion, compute_seconds(model), coding, network, rate)
                yield name, link_name, plan


def row(name: str, link: str, plan: Prediction) -> list[str]:
    """The cells of a line."""
    times = (plan.compute, plan.ddp, plan.local, plan.sync, plan.mean)
    a_day = (sent * _DAY / taken / 1e9 for sent, taken in ((plan.ddp_sent, plan.ddp), (plan.mean_sent, plan.mean)))
    return [
        *(name, link, f"{plan.network.replicas}"),
        *(f"{seconds:.2f}" for seconds in times),
        *(f"{plan.ddp / plan.mean:.2f}", f"{plan.every_step / plan.mean:.2f}"),
        *(f"{gigabytes:,.0f}" for gigabytes in a_day),
    ]


def main() -> None:
    """Print the table as Markdown."""
    rate = expected_sync_rate(CurvaDion([torch.zeros(1, 1)])._cap)
    header = "model, link, replicas, computing, DDP step, local step, sync step, mean step, over DDP, over Dion"
    columns = [*header.split(", "), "DDP GB/day", "ours GB/day"]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for name, link, plan in predictions(rate):
        print(f"| {' | '.join(row(name, link, plan))} |")
    print(f"\n{ASSUMPTIONS.format(rate=rate)}")


if __name__ == "__main__":
    main()
