"""Predictions for what we cannot run: GPTs of 160 million to 8 billion parameters on 8 to 1024 replicas.

    python examples/benchmarks/scaling.py

Only the sync rate is measured, on a small model. The rest follows from the formulas in
``lightning_curvadion/cli/plan/collective_costs.py`` and ``step_prediction.py``.
``tests/cli/plan/test_step_prediction.py`` compares them with two and four real replicas. Models take no memory here.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

# A script has its own folder on the path, but not the root of the clone.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.byte_gpt import GPT, WHOLE
from lightning_curvadion import CurvaDion, split_parameters
from lightning_curvadion.cli.plan.collective_costs import Link, Network
from lightning_curvadion.cli.plan.footprint import dion_step_traffic, measure_footprint
from lightning_curvadion.cli.plan.step_prediction import StepPrediction
from lightning_curvadion.cli.plan.sync_rate import expected_sync_rate
from lightning_curvadion.sync.quantization import WIRE_FORMATS
from lightning_curvadion.sync.settings import SyncSettings
from lightning_curvadion.trainer.strategy import CurvaDionStrategy

VOCABULARY, CONTEXT = 50_304, 1024
# Layers, width and heads.
MODELS = {"160 M": (12, 768, 12), "1.3 B": (22, 2048, 16), "8 B": (38, 4096, 32)}
REPLICAS = (8, 64, 1024)
# A link within a data centre, and two between sites. The latency is of one message, one way.
LINKS = {
    "25 Gbit/s, 50 µs": Link(25e9, 50e-6),
    "1 Gbit/s, 50 ms": Link(1e9, 50e-3),
    "200 Mbit/s, 50 ms": Link(200e6, 50e-3),
}
TOKENS = 65_536
PEAK_FLOPS, UTILISATION = 989e12, 0.4
# Quantization moves some 100 bytes per number through an H100's memory, at half of its 3.35 TB/s.
QUANTIZATION_SECONDS = 100 / (0.5 * 3.35e12)
_SECONDS_PER_DAY = 86_400

ASSUMPTIONS = f"""\
Assumed, not measured: {TOKENS:,} tokens per replica and step, 6 FLOPs per token and parameter, {UTILISATION:.0%} of an
H100's dense bf16 peak of {PEAK_FLOPS / 1e12:.0f} TFLOP/s. Every replica has a link of that speed and latency (of one
message, one way). NCCL uses rings or trees, whichever is faster. Gradients and state are float32. DDP reduces buckets
of 25 MiB while backward runs, 2/3 of a step. CurvaDion has the strategy's defaults, which are {{delays}}.
Quantization moves 100 bytes per number at half of 3.35 TB/s. The sync rate is that of our small runs, {{rate:.1%}};
nobody has measured how it changes with size.
Times are seconds per step. "without delays": a mean step with lag=0 and overlap=0. "shortest": with the "lag, overlap"
that hide most; what long delays cost in loss is not counted. "over DDP" and "over Dion": how many times as fast as DDP,
and as Dion with float32 factors at every step. Bytes are what a replica sends. The optimizer's own step is left out
everywhere, though CurvaDion's local step took 101 times as long as AdamW's on a CPU (examples/benchmarks/step_time.py).
"launches": kernels of a sync step with the optimizer's own, counted in a dry run; a GPU takes some microseconds for
each, which no time here has."""


def default_settings() -> SyncSettings:
    """Those of the strategy."""
    return CurvaDionStrategy().sync.settings


def compute_seconds(model: nn.Module) -> float:
    """Seconds of forward and backward pass on a replica. The embedding is only looked up, so it does not count."""
    multiplied = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("embedding"))
    return 6 * multiplied * TOKENS / (UTILISATION * PEAK_FLOPS)


def predictions(rate: float) -> Iterator[tuple[str, str, StepPrediction]]:
    """Each model on each link with each number of replicas."""
    settings = default_settings()
    for name, (layers, width, heads) in MODELS.items():
        with torch.device("meta"):
            model = GPT(layers, width, heads, CONTEXT, VOCABULARY)
        optimizer = CurvaDion(split_parameters(model, options=WHOLE))
        # An all-reduce has the same input for any number of replicas; quantized shards do not.
        dion_traffic = dion_step_traffic(model, optimizer, REPLICAS[0])
        footprints = {replicas: measure_footprint(model, optimizer, settings, replicas) for replicas in REPLICAS}
        quantization = dict.fromkeys(WIRE_FORMATS, QUANTIZATION_SECONDS)
        compute = compute_seconds(model)
        for link_name, link in LINKS.items():
            for replicas in REPLICAS:
                network = Network(link, replicas, "nccl")
                delays = settings.lag, settings.overlap
                steps = StepPrediction(
                    footprints[replicas], dion_traffic, compute, quantization, network, rate, *delays
                )
                yield name, link_name, steps


def row(name: str, link: str, steps: StepPrediction) -> list[str]:
    """The cells of a row."""
    times = (steps.compute_seconds, steps.ddp_seconds, steps.local_seconds, steps.sync_seconds, steps.mean_seconds)
    waiting, best = replace(steps, lag=0, overlap=0), steps.hidden()
    speeds = (steps.ddp_link_bytes / steps.ddp_seconds, steps.mean_link_bytes / steps.mean_seconds)
    return [
        *(name, link, f"{steps.network.replicas}"),
        *(f"{seconds:.2f}" for seconds in times),
        f"{waiting.mean_seconds:.2f}",
        f"{best.mean_seconds:.2f}",
        f"{best.lag}, {best.overlap}",
        f"{steps.ddp_seconds / steps.mean_seconds:.2f}",
        f"{steps.dion_seconds / steps.mean_seconds:.2f}",
        *(f"{speed * _SECONDS_PER_DAY / 1e9:,.0f}" for speed in speeds),
        f"{steps.footprint.sync.launches:,}",
    ]


def main() -> None:
    """Print the table as Markdown."""
    rate = expected_sync_rate(CurvaDion([torch.zeros(1, 1)])._cap)
    columns = ["model", "link", "replicas", "compute", "DDP step", "local step", "sync step", "mean step"]
    columns += ["without delays", "shortest", "lag, overlap"]
    columns += ["over DDP", "over Dion", "DDP GB/day", "CurvaDion GB/day", "launches"]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for name, link, steps in predictions(rate):
        print(f"| {' | '.join(row(name, link, steps))} |")
    settings = default_settings()
    delays = f"lag={settings.lag} and overlap={settings.overlap}"
    print(f"\n{ASSUMPTIONS.format(rate=rate, delays=delays)}")


if __name__ == "__main__":
    main()
