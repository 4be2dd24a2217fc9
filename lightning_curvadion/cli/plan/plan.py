"""``python -m lightning_curvadion plan``: what a config would cost on a cluster, without the cluster."""

import argparse
import math
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from ...optim import dion
from ...optim.triggers import RMMCThreshold
from ..report.plotting import bytes_told
from ..report.log_readers import ReportError, read_run
from .run_setup import Blueprint, PlanError, blueprint
from .collective_costs import BACKWARD_SHARE, FRAME_PAYLOAD, GLOO_TURNS, Link, Network
from .footprint import Footprint, every_step_traffic, footprint_of
from .step_prediction import Prediction, expected_sync_rate
from .benchmark import coding_seconds, measured_step

_PREFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_DAY = 86_400


def bits_per_second(text: str) -> float:
    """The speed of a link as one writes it.

    Raises:
        PlanError: It is no such speed.

    Example:
        >>> bits_per_second("200Mbit"), bits_per_second("2.5gbit"), bits_per_second("30 mbit/s")
        (200000000.0, 2500000000.0, 30000000.0)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)bit(?:/s|ps)?", text.strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise PlanError(f"--link is a speed in bits a second such as 200Mbit, 25Gbit or 500kbit, not {text!r}")
    return float(found[1]) * _PREFIXES[found[2].lower()]


def seconds(text: str, option: str = "a time") -> float:
    """A time as one writes it.

    Raises:
        PlanError: It is no such time.

    Example:
        >>> seconds("20ms"), seconds("0.8s"), seconds("500us")
        (0.02, 0.8, 0.0005)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|ms|us)", text.strip().replace("µ", "u"), re.IGNORECASE)
    if found is None:
        raise PlanError(f"{option} is a number with s, ms or us, such as 0.8s or 20ms, not {text!r}")
    return float(found[1]) * _SECONDS[found[2].lower()]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise PlanError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m lightning_curvadion plan",
        description="Say what a config would cost on a cluster: bytes, seconds, memory, beside DDP. All other arguments"
        " are those of fit: --config FILE and what overrides it. No accelerator, no logger and no process is started.",
        allow_abbrev=False,
    )
    parser.add_argument("--link", required=True, help="speed of one replica's link, such as 200Mbit or 25Gbit")
    parser.add_argument("--latency", required=True, help="of one message, one way (half a ping), such as 20ms")
    parser.add_argument("--replicas", type=int, help="default: devices times num_nodes of the config")
    parser.add_argument("--step-time", help="of a step that sends nothing, such as 0.8s; default: measured here")
    parser.add_argument("--sync-rate", type=float, help="share of the steps that synchronise, such as 0.2")
    parser.add_argument(
        "--coding-speed",
        type=float,
        help="GB/s of float32 that the cluster's devices code and decode, as printed below; default: measured here",
    )
    parser.add_argument("--run", type=Path, help="take the sync rate from the logs of a run (CommunicationMonitor)")
    return parser


def main(args: list[str]) -> int:
    """The command line.

    Returns:
        The exit status: 0, or 2 after one line about bad input.

    Example:
        >>> main(["--link", "fast", "--latency", "1ms"])
        2
    """
    try:
        own, rest = _parser().parse_known_args(args)
        print("\n".join(_plan(own, rest)))
    except (PlanError, ReportError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    return 0


def _plan(own: argparse.Namespace, rest: Sequence[str]) -> list[str]:
    link = Link(bits_per_second(own.link), seconds(own.latency, "--latency"))
    compute = seconds(own.step_time, "--step-time") if own.step_time else None
    if own.sync_rate is not None and not 0 <= own.sync_rate <= 1:
        raise PlanError(f"--sync-rate is a share of the steps between 0 and 1, not {own.sync_rate}")
    if own.coding_speed is not None and not own.coding_speed > 0:
        raise PlanError(f"--coding-speed is a number of GB/s above 0, not {own.coding_speed}")
    drawn = blueprint(rest)
    replicas = own.replicas if own.replicas is not None else drawn.replicas
    if replicas is None:
        raise PlanError("the config leaves the number of devices to the machine: say --replicas")
    if replicas < 2:
        raise PlanError(f"--replicas must be at least 2, not {replicas}: one replica alone sends nothing")
    network = Network(link, replicas, drawn.backend)
    rate, why_rate = _sync_rate(drawn, own.sync_rate, own.run)
    sizes = footprint_of(drawn.model, drawn.optimizer, drawn.settings, replicas)
    dion_traffic = every_step_traffic(drawn.model, drawn.optimizer, replicas)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    formats = {*sizes.sync.numbers, *dion_traffic.numbers}
    why_coding = f"measured on this machine's {device.type}; for other devices say --coding-speed"
    if own.coding_speed is None:
        coding = {name: coding_seconds(name, device) for name in formats}
    else:
        coding, why_coding = dict.fromkeys(formats, 4e-9 / own.coding_speed), "as --coding-speed says"
    why_compute = "as --step-time says"
    if compute is None:
        compute, steps, where = measured_step(rest)
        why_compute = f"median of {steps} steps measured here on {where}; for the cluster's devices say --step-time"
    ours = Prediction(sizes, dion_traffic, compute, coding, network, rate)
    return [
        *_heading(drawn, network),
        *_model(drawn),
        *_steps(ours, why_rate, why_compute),
        _coding(ours, why_coding),
        *_memory(sizes),
        *_assumptions(drawn),
    ]


def _sync_rate(drawn: Blueprint, given: float | None, run: Path | None) -> tuple[float, str]:
    if given is not None:
        return given, "as --sync-rate says"
    if run is not None:
        return _logged_rate(run)
    cap = drawn.optimizer._cap
    rate, low, high = (expected_sync_rate(cap, scale) for scale in (1.0, 0.5, 2.0))
    if max(abs(low - rate), abs(high - rate)) < 0.05 * rate:
        return rate, f"{type(cap.trigger).__name__}, whatever RMMC is"
    kind = "a guess" if isinstance(cap.trigger, RMMCThreshold) else "expected"
    shown = f"{100 * low:.0f} to {100 * high:.0f} %"
    return rate, f"{type(cap.trigger).__name__}, {kind} with RMMC as in the main job; {shown} with half or twice of it"


def _logged_rate(folder: Path) -> tuple[float, str]:
    run = read_run(folder)
    logged = run.named("sync_rate")
    if not logged:
        raise PlanError(f"{folder} has no curvadion/sync_rate: train with the callback CommunicationMonitor")
    source = f"of the {logged.steps[-1] + 1} steps in {run.source}"
    rmmc = [math.log(value) for value in run.named("rmmc").finite().values if value > 0]
    if late := rmmc[len(rmmc) // 2 :]:
        spread = statistics.pstdev(late)
        source += f"; ln RMMC of its second half: mean {statistics.mean(late):.2f}, spread {spread:.2f}"
    return logged.last, source


# -- what is printed -------------------------------------------------------------------------------------------------


def _table(rows: Iterable[Sequence[Any]], width: int = 34) -> list[str]:
    return [f"  {name:<{width}}" + "".join(f"{cell:>16}" for cell in cells) for name, *cells in rows]


def _time(number: float) -> str:
    return f"{number:.2f} s" if number >= 1 else f"{1e3 * number:.1f} ms"


def _speed(number: float) -> str:
    for unit, size in (("Gbit/s", 1e9), ("Mbit/s", 1e6), ("kbit/s", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g} bit/s"


def _heading(drawn: Blueprint, network: Network) -> list[str]:
    settings, trigger = drawn.settings, drawn.optimizer.trigger
    chosen = {name: value for name, value in vars(trigger).items() if name not in trigger._state}
    options = ", ".join(f"{name}={value}" for name, value in chosen.items())
    return [
        f"{type(drawn.model).__name__} on {network.replicas} replicas, each with a link of"
        f" {_speed(network.link.bits_per_second)}, {_time(network.link.latency)} a message one way ({drawn.backend})",
        f"consensus {settings.consensus}, wire format {settings.wire_format}, momentum {settings.momentum},"
        f" trigger {type(trigger).__name__}({options})",
        *drawn.notes,
    ]


def _model(drawn: Blueprint) -> list[str]:
    groups = [
        (f"{group.get('name', f'group {number}')} ({group['algorithm']})", group["params"])
        for number, group in enumerate(drawn.optimizer.param_groups)
    ]
    rows: list[tuple[str, ...]] = [("model", "tensors", "numbers", "of all")]
    total = sum(parameter.numel() for _, members in groups for parameter in members)
    for name, members in [*groups, ("all", [parameter for _, own in groups for parameter in own])]:
        numbers = sum(parameter.numel() for parameter in members)
        rows.append((name, str(len(members)), f"{numbers:,}", f"{100 * numbers / total:.1f} %"))
    factors = sum(
        dion.rank_of(parameter.shape, group["rank_fraction"]) * sum(parameter.shape)
        for group in drawn.optimizer.param_groups
        if group["algorithm"] == "dion"
        for parameter in group["params"]
    )
    rows.append(("factors of the optimizer's rank", "", f"{factors:,}", f"{100 * factors / total:.1f} %"))
    embeddings = [
        (module.weight.numel(), f"largest embedding, {name}")
        for name, module in drawn.model.named_modules()
        if isinstance(module, torch.nn.Embedding)
    ]
    if embeddings:
        numbers, name = max(embeddings)
        rows.append((name, "1", f"{numbers:,}", f"{100 * numbers / total:.1f} %"))
    return ["", *_table(rows)]


def _steps(ours: Prediction, why_rate: str, why_compute: str) -> list[str]:
    sizes = ours.footprint
    exchange = ours.sync - ours.local - ours.coding_of(sizes.sync)
    mean_payload = ours.sync_rate * sizes.sync.bytes_sent + (1 - ours.sync_rate) * sizes.local.bytes_sent

    def row(name: str, time: float, payload: float, sent: float, a_day: bool = True) -> tuple[str, ...]:
        return name, _time(time), bytes_told(payload), bytes_told(sent), bytes_told(sent * _DAY / time) if a_day else ""

    rows = [
        ("a step of one replica", "time", "bytes_sent", "on its link", "a day"),
        row("local step", ours.local, sizes.local.bytes_sent, ours.sent(sizes.local), a_day=False),
        row("sync step", ours.sync, sizes.sync.bytes_sent, ours.sent(sizes.sync), a_day=False),
        ("  of it coding", _time(ours.coding_of(sizes.sync))),
        ("  of it exchanges", _time(exchange)),
        row("mean step", ours.mean, mean_payload, ours.mean_sent),
        row("DDP", ours.ddp, sum(sizes.buckets), ours.ddp_sent),
        row("Dion's factors at every step", ours.every_step, ours.dion.bytes_sent, ours.sent(ours.dion)),
    ]
    return [
        "",
        f"sync rate {100 * ours.sync_rate:.1f} %: {why_rate}",
        f"computing {_time(ours.compute)} a step: {why_compute}",
        "",
        *_table(rows),
        "",
        f"{_times(ours.ddp / ours.mean)} DDP, {_times(ours.every_step / ours.mean)} Dion at every step,"
        f" with {_share(ours.mean_sent / ours.ddp_sent)} of DDP's bytes a step.",
        _break_even(ours),
    ]


def _times(ratio: float) -> str:
    return f"{ratio:.2f} times as fast as"


def _share(ratio: float) -> str:
    return f"{100 * ratio:.2g} %" if ratio < 1 else f"{100 * ratio:.0f} %"


def _break_even(ours: Prediction) -> str:
    speed = ours.speed_where_ddp_is_as_good
    if speed is None:
        quicker = "these settings are" if ours.mean < ours.ddp else "DDP is"
        return f"At no link speed would DDP be as good and no better: {quicker} quicker at any, this latency given."
    return f"DDP would be as good on links of {_speed(speed)}."


def _coding(ours: Prediction, why: str) -> str:
    speeds = ", ".join(f"{name} {4e-9 / spent:.2f}" for name, spent in sorted(ours.coding.items()))
    return f"Coding, GB/s of float32, in and out and all copies: {speeds}, {why}."


def _memory(sizes: Footprint) -> list[str]:
    buckets = sum(sizes.buckets)
    rows = {
        "parameters": (sizes.parameters, sizes.parameters),
        "gradients": (sizes.gradients, sizes.gradients),
        "optimizer state": (sizes.state, sizes.state),
        "anchors (the last consensus)": (sizes.anchors, 0),
        "residuals, outer momentum": (sizes.residuals, 0),
        "gradient buckets": (0, buckets),
        "temporaries of a sync step": (sizes.sync.temporaries, 0),
    }
    ours, ddp = zip(*rows.values(), strict=True)
    rows["all, without activations"] = sum(ours), sum(ddp)
    shown = [(name, *map(bytes_told, both)) for name, both in rows.items()]
    return ["", *_table([("memory of a replica", "ours", "DDP, CurvaDion"), *shown])]


def _assumptions(drawn: Blueprint) -> list[str]:
    gloo = f"rings, and {GLOO_TURNS} times as long where two replicas send to each other"
    ways = gloo if drawn.backend == "gloo" else "rings or trees, whichever is quicker"
    return [
        "",
        "Assumed: a message of n bytes takes latency + n / speed (Hockney, 1994), and frames carry"
        f" {100 * FRAME_PAYLOAD:.0f} % payload;\n{drawn.backend} uses"
        f" {ways};",
        "every replica has a link of its own, and all are equally fast; DDP has buckets of 25 MiB, reduced while"
        f" backward runs,\nwhich is {BACKWARD_SHARE:.2f} of a step;"
        " ours overlaps nothing; all three take the same optimizer's step. Not counted: validation and checkpoints.",
    ]
