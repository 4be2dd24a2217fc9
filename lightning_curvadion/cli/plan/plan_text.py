"""The text of a plan, as the command prints it."""

import math
from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from ...optim import dion
from ...optim.matrix_layout import matrix_shape
from ...trainer.formatting import format_bit_rate, format_bytes, format_seconds, format_table
from .collective_costs import FRAME_PAYLOAD, GLOO_DUPLEX_FACTOR, Network
from .footprint import Footprint
from .plan import Plan
from .run_setup import RunSetup
from .step_prediction import BACKWARD_SHARE, StepPrediction

_SECONDS_PER_DAY = 86_400


def format_plan(plan: Plan) -> str:
    """The whole text.

    Example:
        >>> from lightning_curvadion.cli.plan.arguments import parse_arguments
        >>> from lightning_curvadion.cli.plan.plan import make_plan
        >>> options = ["--link=1Gbit", "--latency=1ms", "--replicas=2", "--step-time=10ms", "--coding-speed=50"]
        >>> model = ["--model=lightning.pytorch.demos.boring_classes.BoringModel", "--optimizer=CurvaDion"]
        >>> text = format_plan(make_plan(parse_arguments([*options, *model])))
        >>> text.splitlines()[0].partition(" (")[0]
        'BoringModel on 2 replicas, each on a link of 1 Gbit/s with 1.0 ms latency'
    """
    setup, steps = plan.setup, plan.steps
    blocks = [
        _heading(setup, steps.network),
        format_table(_parameter_rows(setup.model, setup.optimizer)),
        [
            f"sync rate {100 * steps.sync_rate:.1f} %: {plan.sync_rate_source}",
            f"compute {format_seconds(steps.compute_seconds)} per step: {plan.compute_source}",
        ],
        format_table(_step_rows(steps)),
        [
            *_comparison(steps),
            _quantization_speed(steps, plan.quantization_source),
            f"Kernel launches in a sync step: {steps.footprint.sync.launches:,}, in a local step:"
            f" {steps.footprint.local.launches:,}; a GPU takes some microseconds for each.",
        ],
        format_table(_memory_rows(steps.footprint)),
        _assumptions(setup.backend),
    ]
    return "\n\n".join("\n".join(lines) for lines in blocks)


def _heading(setup: RunSetup, network: Network) -> list[str]:
    settings, trigger = setup.settings, setup.optimizer.trigger
    options = {name: value for name, value in vars(trigger).items() if name not in trigger._state}
    arguments = ", ".join(f"{name}={value}" for name, value in options.items())
    speed, latency = format_bit_rate(network.link.bits_per_second), format_seconds(network.link.latency)
    return [
        f"{type(setup.model).__name__} on {network.replicas} replicas, each on a link of {speed} with {latency} latency"
        f" ({setup.backend})",
        f"consensus {settings.consensus}, wire format {settings.wire_format} ({settings.vector_format} for vectors),"
        f" momentum {settings.momentum}, trigger {type(trigger).__name__}({arguments})",
        *setup.notes,
    ]


def _parameter_rows(model: nn.Module, optimizer: Optimizer) -> Iterable[tuple[str, ...]]:
    groups = [
        (f"{group.get('name', f'group {number}')} ({group['algorithm']})", group["params"])
        for number, group in enumerate(optimizer.param_groups)
    ]
    groups.append(("all", [parameter for _, members in groups for parameter in members]))
    total = sum(parameter.numel() for parameter in groups[-1][1])

    def row(label: str, tensors: str, numel: int) -> tuple[str, ...]:
        return label, tensors, f"{numel:,}", f"{100 * numel / total:.1f} %"

    yield "parameter group", "tensors", "parameters", "share"
    for label, members in groups:
        yield row(label, str(len(members)), sum(parameter.numel() for parameter in members))
    factors = sum(
        dion.rank_of(shape, group["rank_fraction"]) * sum(shape) * (parameter.numel() // math.prod(shape))
        for group in optimizer.param_groups
        if group["algorithm"] == "dion"
        for parameter in group["params"]
        for shape in [matrix_shape(parameter.shape, group["flatten"])]
    )
    yield row("factors of the optimizer's rank", "", factors)
    embeddings = [
        (module.weight.numel(), f"largest embedding, {name}")
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    ]
    if embeddings:
        numel, label = max(embeddings)
        yield row(label, "1", numel)


def _step_rows(steps: StepPrediction) -> list[tuple[str, ...]]:
    local, sync = steps.footprint.local, steps.footprint.sync
    quantization = steps.quantization_seconds(sync)
    collectives = steps.sync_seconds - steps.local_seconds - quantization
    mean_payload = steps.sync_rate * sync.bytes_sent + (1 - steps.sync_rate) * local.bytes_sent

    def row(label: str, seconds: float, payload: float, link_bytes: float) -> tuple[str, ...]:
        return label, format_seconds(seconds), format_bytes(payload), format_bytes(link_bytes)

    def run_row(label: str, seconds: float, payload: float, link_bytes: float) -> tuple[str, ...]:
        per_day = format_bytes(link_bytes * _SECONDS_PER_DAY / seconds)
        return (*row(label, seconds, payload, link_bytes), per_day)

    dion_traffic = steps.dion_traffic
    return [
        ("step of one replica", "time", "bytes_sent", "on its link", "per day"),
        row("local step", steps.local_seconds, local.bytes_sent, steps.link_bytes(local)),
        row("sync step", steps.sync_seconds, sync.bytes_sent, steps.link_bytes(sync)),
        ("  of which quantization", format_seconds(quantization)),
        ("  of which collectives", format_seconds(collectives)),
        run_row("mean step", steps.mean_seconds, mean_payload, steps.mean_link_bytes),
        run_row("DDP", steps.ddp_seconds, sum(steps.footprint.buckets), steps.ddp_link_bytes),
        run_row(
            "Dion (syncs at every step)", steps.dion_seconds, dion_traffic.bytes_sent, steps.link_bytes(dion_traffic)
        ),
    ]


def _comparison(steps: StepPrediction) -> list[str]:
    over_ddp, over_dion = steps.ddp_seconds / steps.mean_seconds, steps.dion_seconds / steps.mean_seconds
    share = steps.mean_link_bytes / steps.ddp_link_bytes
    share_text = f"{100 * share:.2g} %" if share < 1 else f"{100 * share:.0f} %"
    speed = steps.break_even_bit_rate
    if speed is None:
        faster = "CurvaDion" if steps.mean_seconds < steps.ddp_seconds else "DDP"
        break_even = f"No link speed makes DDP equally fast: with this latency {faster} is faster at any speed."
    else:
        break_even = f"DDP is equally fast on links of {format_bit_rate(speed)}."
    return [
        f"The mean step is {over_ddp:.2f} times as fast as DDP and {over_dion:.2f} times as fast as Dion, with"
        f" {share_text} of DDP's bytes.",
        break_even,
    ]


def _quantization_speed(steps: StepPrediction, source: str) -> str:
    speeds = sorted((name, 4e-9 / seconds) for name, seconds in steps.seconds_per_number.items())
    return f"Quantization, GB/s of float32: {', '.join(f'{name} {speed:.2f}' for name, speed in speeds)}, {source}."


def _memory_rows(footprint: Footprint) -> list[tuple[str, ...]]:
    buckets = sum(footprint.buckets)
    memory = {
        "parameters": (footprint.parameters, footprint.parameters),
        "gradients": (footprint.gradients, footprint.gradients),
        "optimizer state": (footprint.optimizer_state, footprint.optimizer_state),
        "anchors (the last consensus)": (footprint.anchors, 0),
        "residuals, outer momentum": (footprint.residuals, 0),
        "gradient buckets": (0, buckets),
        "temporaries of a sync step": (footprint.sync.temporaries, 0),
    }
    curvadion, ddp = zip(*memory.values(), strict=True)
    memory["all, without activations"] = sum(curvadion), sum(ddp)
    rows = [(label, *map(format_bytes, both)) for label, both in memory.items()]
    return [("memory of a replica", "CurvaDion", "DDP"), *rows]


def _assumptions(backend: str) -> list[str]:
    gloo = f"gloo uses rings, and takes {GLOO_DUPLEX_FACTOR} times as long where two replicas send to each other."
    return [
        "Assumptions: a message of n bytes takes latency + n / speed (Hockney, 1994);"
        f" {100 * FRAME_PAYLOAD:.0f} % of a frame is payload.",
        gloo if backend == "gloo" else f"{backend} uses rings or trees, whichever is faster.",
        "Every replica has a link of its own, and all replicas are equally fast.",
        f"DDP reduces buckets of 25 MiB while backward runs, {BACKWARD_SHARE:.2f} of a step; CurvaDion hides nothing.",
        "DDP and Dion run the same optimizer as CurvaDion. Not counted: validation and checkpoints.",
        "All rows of an embedding are counted; of a large one, only those that moved travel.",
    ]
