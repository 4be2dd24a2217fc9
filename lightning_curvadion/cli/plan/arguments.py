"""Arguments of ``python -m lightning_curvadion plan``, with their units."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ..errors import PlanError
from .collective_costs import Link

_PREFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


@dataclass(frozen=True)
class PlanArguments:
    """The checked arguments.

    Attributes:
        link: Speed and latency of one replica's link.
        replicas: Their number, or ``None`` to take it from the config.
        step_seconds: Seconds of a step without communication, or ``None`` to measure it.
        sync_rate: Share of the steps that synchronise, or ``None`` to estimate it.
        quantization_speed: In GB/s of float32, or ``None`` to measure it.
        run: Logs to take the sync rate from.
        fit_args: All other arguments: those of ``fit``.
    """

    link: Link
    replicas: int | None
    step_seconds: float | None
    sync_rate: float | None
    quantization_speed: float | None
    run: Path | None
    fit_args: Sequence[str]


def parse_bit_rate(text: str) -> float:
    """Bits per second of a link speed such as ``200Mbit``.

    Raises:
        PlanError: The text is no such speed.

    Example:
        >>> parse_bit_rate("200Mbit"), parse_bit_rate("2.5gbit"), parse_bit_rate("30 mbit/s")
        (200000000.0, 2500000000.0, 30000000.0)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)bit(?:/s|ps)?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise PlanError(f"--link is a speed in bits per second such as 200Mbit, 25Gbit or 500kbit, not {text!r}")
    return float(match[1]) * _PREFIXES[match[2].lower()]


def parse_duration(text: str, option: str = "a time") -> float:
    """Seconds of a duration such as ``20ms``.

    Raises:
        PlanError: The text is no such duration.

    Example:
        >>> parse_duration("20ms"), parse_duration("0.8s"), parse_duration("500us")
        (0.02, 0.8, 0.0005)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|ms|us)", text.strip().replace("µ", "u"), re.IGNORECASE)
    if match is None:
        raise PlanError(f"{option} is a number with s, ms or us, such as 0.8s or 20ms, not {text!r}")
    return float(match[1]) * _SECONDS[match[2].lower()]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise PlanError(message)


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m lightning_curvadion plan",
        description="Predict bytes, seconds and memory of a config on a cluster, beside DDP. Other arguments are those"
        " of fit: --config FILE and what overrides it. No accelerator, logger or process is started.",
        allow_abbrev=False,
    )
    parser.add_argument("--link", required=True, help="speed of one replica's link, such as 200Mbit or 25Gbit")
    parser.add_argument("--latency", required=True, help="of one message, one way (half a ping), such as 20ms")
    parser.add_argument("--replicas", type=int, help="default: devices times num_nodes of the config")
    parser.add_argument("--step-time", help="of a step without communication, such as 0.8s; default: measured here")
    parser.add_argument("--sync-rate", type=float, help="share of the steps that synchronise, such as 0.2")
    parser.add_argument(
        "--coding-speed",
        type=float,
        help="GB/s of float32 that a device of the cluster quantizes and dequantizes; default: measured here",
    )
    parser.add_argument("--run", type=Path, help="take the sync rate from the logs of a run (CommunicationMonitor)")
    return parser


def parse_arguments(args: Sequence[str]) -> PlanArguments:
    """Parse and check the command line.

    Args:
        args: What follows ``python -m lightning_curvadion plan``.

    Raises:
        PlanError: An argument is missing or wrong.

    Example:
        >>> parsed = parse_arguments(["--link=1Gbit", "--latency=1ms", "--config=fit.yaml"])
        >>> parsed.link, parsed.fit_args
        (Link(bits_per_second=1000000000.0, latency=0.001), ['--config=fit.yaml'])
    """
    options, fit_args = _build_parser().parse_known_args(list(args))
    link = Link(parse_bit_rate(options.link), parse_duration(options.latency, "--latency"))
    step_seconds = parse_duration(options.step_time, "--step-time") if options.step_time else None
    if options.sync_rate is not None and not 0 <= options.sync_rate <= 1:
        raise PlanError(f"--sync-rate is a share of the steps between 0 and 1, not {options.sync_rate}")
    if options.coding_speed is not None and not options.coding_speed > 0:
        raise PlanError(f"--coding-speed is a number of GB/s above 0, not {options.coding_speed}")
    return PlanArguments(
        link, options.replicas, step_seconds, options.sync_rate, options.coding_speed, options.run, fit_args
    )
