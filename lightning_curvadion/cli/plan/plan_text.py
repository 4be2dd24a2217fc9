"""The text of a plan, as the command prints it."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ...optim import dion
from ...optim.matrix_layout import matrix_shape
from ...sync.settings import has_small_groups
from ...trainer.formatting import format_bit_rate, format_bytes, format_percent, format_seconds, format_table
from ...trainer.run_settings import describe_trigger
from .collective_costs import FRAME_PAYLOAD, GLOO_DUPLEX_FACTOR, Network
from .footprint import Footprint
from .plan import Plan
from .run_setup import RunSetup
from .step_prediction import BACKWARD_SHARE, StepPrediction

_SECONDS_PER_DAY = 86_400
# A step that another lag or overlap makes a hundredth shorter is worth a line.
_WORTH_ADVICE = 0.99
_LINK_SPEEDS = (1e7, 1e8, 1e9, 1e10, 1e11)


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
    setup, steps = plan.setup, plan.steps[0]
    rates = " to ".join(f"{100 * each.sync_rate:.1f}" for each in plan.steps)
    blocks = [
        _heading(setup, steps.network),
        format_table(_parameter_rows(setup.model, setup.optimizer)),
        [
            f"sync rate {rates} %: {plan.sync_rate_source}",
            f"compute {format_seconds(steps.compute_seconds)} per step: {plan.compute_source}",
        ],
        format_table(_step_rows(plan.steps)),
        list(_delays(plan)),
        format_table(_run_rows(plan)),
        format_table(_speed_rows(plan.steps), label_width=12, cell_width=24),
        [
            _quantization_speed(steps, plan.quantization_source),
            f"Kernel launches in a sync step: {steps.footprint.sync.launches:,}, in a local step:"
            f" {steps.footprint.local.launches:,}; a GPU takes some microseconds for each.",
        ],
        format_table(_memory_rows(steps.footprint)),
        _assumptions(setup.backend),
    ]
    return "\n\n".join("\n".join(lines) for lines in blocks)


def _heading(setup: RunSetup, network: Network) -> list[str]:
    settings = setup.settings
    speed, latency = format_bit_rate(network.link.bits_per_second), format_seconds(network.link.latency)
    vectors = settings.small_format if has_small_groups(setup.optimizer) else settings.embedding_format
    return [
        f"{type(setup.model).__name__} on {network.replicas} replicas, each on a link of {speed} with {latency} latency"
        f" ({setup.backend})",
        f"consensus {settings.consensus}, wire format {settings.wire_format} ({vectors} for vectors,"
        f" {settings.small_format} for those of one dimension),"
        f" momentum {settings.momentum}, trigger {describe_trigger(setup.optimizer.trigger)}",
        *setup.notes,
    ]


def _parameter_rows(model: nn.Module, optimizer: Optimizer) -> Iterable[tuple[str, ...]]:
    groups = [
        (f"{group.get('name', f'group {number}')} ({_algorithm(group)})", group["params"])
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
        if group["algorithm"] == "dion" and group["local_update"] == "dion"
        for parameter in group["params"]
        for shape in [matrix_shape(parameter.shape, group)]
    )
    if factors:
        yield row("factors of the optimizer's rank", "", factors)
    embeddings = [
        (module.weight.numel(), f"largest embedding, {name}")
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    ]
    if embeddings:
        numel, label = max(embeddings)
        yield row(label, "1", numel)


def _algorithm(group: dict[str, Any]) -> str:
    name = group["local_update"] if group["algorithm"] == "dion" else group["algorithm"]
    return {"muon": "Muon", "dion": "Dion", "sgd": "SGD", "adamw": "AdamW", "lion": "Lion"}[name]


def _step_rows(predictions: Sequence[StepPrediction]) -> list[tuple[str, ...]]:
    steps = predictions[0]
    local, sync = steps.footprint.local, steps.footprint.sync

    def row(label: str, seconds: float, payload: float, link_bytes: float) -> tuple[str, ...]:
        return label, format_seconds(seconds), format_bytes(payload), format_bytes(link_bytes)

    def run_row(label: str, seconds: float, payload: float, link_bytes: float) -> tuple[str, ...]:
        per_day = format_bytes(link_bytes * _SECONDS_PER_DAY / seconds)
        return (*row(label, seconds, payload, link_bytes), per_day)

    means = [
        run_row(f"mean step, {100 * p.sync_rate:.1f} % sync", p.mean_seconds, p.mean_payload, p.mean_link_bytes)
        for p in predictions
    ]
    dion_traffic = steps.dion_traffic
    return [
        ("step of one replica", "time", "payload", "on its link", "link per day"),
        row("local step", steps.local_seconds, local.bytes_sent, steps.link_bytes(local)),
        ("  of it waiting: agreement", format_seconds(steps.agreement_waiting)),
        row("sync step", steps.sync_seconds, sync.bytes_sent, steps.link_bytes(sync)),
        ("  of it waiting: agreement", format_seconds(steps.sync_agreement_waiting)),
        ("  of it waiting: other collectives", _range([p.mean_waiting for p in predictions], format_seconds)),
        ("  of it quantization", format_seconds(steps.quantization_seconds(sync))),
        *means,
        run_row("DDP", steps.ddp_seconds, sum(steps.footprint.buckets), steps.ddp_link_bytes),
        run_row(
            "Dion (syncs at every step)", steps.dion_seconds, dion_traffic.bytes_sent, steps.link_bytes(dion_traffic)
        ),
    ]


def _delays(plan: Plan) -> Iterable[str]:
    """What there is to wait for, and which lag and overlap would hide it."""
    steps, overlaps = plan.steps[0], plan.setup.settings.sends_parameters_alone
    yield (
        f"An agreement takes {format_seconds(steps.agreement_seconds)}, with lag={steps.lag}; the other collectives of"
        f" a sync step take {format_seconds(steps.mean_collective_seconds)}, with overlap={steps.overlap}."
    )
    advice = []
    for given in plan.steps:
        best = given.hidden(overlaps)
        if best.mean_seconds < _WORTH_ADVICE * given.mean_seconds:
            delays = f"lag={best.lag}, overlap={best.overlap}" if overlaps else f"lag={best.lag}"
            advice.append(f"{delays} ({format_seconds(best.mean_seconds)} at {100 * best.sync_rate:.1f} % sync)")
    if advice:
        yield f"The mean step is shortest with {' or '.join(advice)}."


def _run_rows(plan: Plan) -> list[tuple[str, ...]]:
    """What the run sends by cause, as far as the config tells; else what one validation and one checkpoint send."""
    schedule, consensus = plan.setup.schedule, plan.consensus
    if not schedule.is_known:
        return [
            ("the data decides on the number of", "payload of each"),
            ("validations", format_bytes(consensus.validation)),
            ("checkpoints", format_bytes(consensus.checkpoint)),
            ("checkpoints after a validation", format_bytes(consensus.checkpoint_after_validation)),
        ]
    count = schedule.steps or 0
    parts = consensus.of_run(schedule)
    ddp = count * sum(plan.steps[0].footprint.buckets)
    in_steps = [count * prediction.mean_payload for prediction in plan.steps]
    totals = [sent + sum(parts.values()) for sent in in_steps]
    saved = (schedule.checkpoints or 0) + (schedule.checkpoints_after_validation or 0)
    return [
        ("whole run, a replica", "number", "payload"),
        ("steps", f"{count:,}", _range(in_steps, format_bytes)),
        ("validation", f"{schedule.validations:,}", format_bytes(parts["validation"])),
        ("checkpoints" + ", at most" * schedule.best_only, f"{saved:,}", format_bytes(parts["checkpoints"])),
        ("start and end", "", format_bytes(parts["start and end"])),
        ("all", "", _range(totals, format_bytes)),
        ("DDP", "", format_bytes(ddp)),
        ("share of DDP", "", _range([total / ddp for total in totals], format_percent)),
    ]


def _speed_rows(predictions: Sequence[StepPrediction]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("links of", "DDP", "CurvaDion", "times as fast")]
    for speed in _LINK_SPEEDS:
        at_speed = [prediction.at_bit_rate(speed) for prediction in predictions]
        ddp = at_speed[0].ddp_seconds
        seconds = [prediction.mean_seconds for prediction in at_speed]
        speed_ups = [ddp / each for each in reversed(seconds)]
        cells = format_seconds(ddp), _range(seconds, format_seconds), _range(speed_ups, "{:.2f}".format)
        rows.append((format_bit_rate(speed), *cells))
    return rows


def _range(values: Sequence[float], text: Callable[[float], str]) -> str:
    """One value, or two as a range that names their unit once."""
    low, *high = dict.fromkeys(map(text, values))
    if not high:
        return low
    unit = high[0].partition(" ")[2]
    return f"{low.removesuffix(f' {unit}')} to {high[0]}"


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
        "copies of a mean under way": (footprint.copies, 0),
    }
    curvadion, ddp = zip(*memory.values(), strict=True)
    memory["all, without activations"] = sum(curvadion), sum(ddp)
    rows = [(label, *map(format_bytes, both)) for label, both in memory.items()]
    return [("memory of a replica", "CurvaDion", "DDP"), *rows]


def _assumptions(backend: str) -> list[str]:
    gloo = (
        f"gloo uses rings, takes {GLOO_DUPLEX_FACTOR} times as long where two replicas send to each other, and waits a"
        " latency for each notice that a receiver is ready."
    )
    return [
        "Assumptions: a message of n bytes takes latency + n / speed (Hockney, 1994);"
        f" {100 * FRAME_PAYLOAD:.0f} % of a frame is payload.",
        gloo if backend == "gloo" else f"{backend} uses rings or trees, whichever is faster.",
        "Every replica has a link of its own, and all replicas are equally fast.",
        f"DDP reduces buckets of 25 MiB while backward runs, {BACKWARD_SHARE:.2f} of a step.",
        "CurvaDion hides what arrives within as many steps as lag and overlap say.",
        "DDP and Dion run the same optimizer as CurvaDion. No time is counted for validation and checkpoints.",
        "All rows of an embedding are counted; of a large one, only those that moved travel.",
    ]
