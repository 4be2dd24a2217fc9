"""Arguments of ``python -m lightning_curvadion plan``, with their units."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ..errors import PlanError
from .collective_costs import Link

_NUMBER = r"-?\d+(?:\.\d+)?"
_PREFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "": 1.0}
_OPTIONS = ("--link", "--inner-link", "--latency", "--replicas", "--step-time", "--sync-rate", "--coding-speed")


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
        inner_link: Speed of the link between the processes of a replica, or ``None`` if the time of a step has it.
        fit_args: All other arguments: those of ``fit``.
    """

    link: Link
    replicas: int | None
    step_seconds: float | None
    sync_rate: float | None
    quantization_speed: float | None
    run: Path | None
    inner_link: Link | None
    fit_args: Sequence[str]


def parse_bit_rate(text: str, option: str = "--link") -> float:
    """Bits per second of a link speed such as ``200Mbit``.

    Raises:
        PlanError: The text is no such speed.

    Example:
        >>> parse_bit_rate("200Mbit"), parse_bit_rate("2.5 Gbit/s"), parse_bit_rate("10Gbps"), parse_bit_rate("10Gb/s")
        (200000000.0, 2500000000.0, 10000000000.0, 10000000000.0)
    """
    match = re.fullmatch(rf"({_NUMBER})\s*([kmgt]?)(bits?|b)(?:/s|ps)?", text.strip(), re.IGNORECASE)
    if match is None or match[3] == "B":
        in_bytes = " (B counts bytes)" if match else ""
        raise PlanError(
            f"{option} is a speed in bits per second such as 200Mbit, 25Gbit or 500kbit, not {text!r}{in_bytes}"
        )
    return _positive(float(match[1]), option, text) * _PREFIXES[match[2].lower()]


def parse_duration(text: str, option: str = "a time") -> float:
    """Seconds of a duration such as ``20ms``; 0 needs no unit.

    Raises:
        PlanError: The text is no such duration, or a negative one.

    Example:
        >>> parse_duration("20ms"), parse_duration("0.8s"), parse_duration("500us"), parse_duration("0")
        (0.02, 0.8, 0.0005, 0.0)
    """
    match = re.fullmatch(rf"({_NUMBER})\s*(s|ms|us|)", text.strip().replace("µ", "u"), re.IGNORECASE)
    if match is None or not (match[2] or float(match[1]) == 0):
        raise PlanError(f"{option} is a number with s, ms or us, such as 0.8s or 20ms, not {text!r}")
    if float(match[1]) < 0:
        raise PlanError(f"{option} cannot be negative, as {text!r} is")
    return float(match[1]) * _SECONDS[match[2].lower()]


def parse_share(text: str, option: str) -> float:
    """A share such as ``0.2`` or ``20%``.

    Raises:
        PlanError: The text is no number, or no share.

    Example:
        >>> parse_share("0.25", "--sync-rate"), parse_share("25 %", "--sync-rate")
        (0.25, 0.25)
    """
    match = re.fullmatch(rf"({_NUMBER})\s*(%?)", text.strip())
    share = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= share <= 1:
        raise PlanError(f"{option} is a share of the steps between 0 and 1, such as 0.2 or 20%, not {text!r}")
    return share


def _parse_speed(text: str) -> float:
    match = re.fullmatch(rf"({_NUMBER})\s*(?:GB/s)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise PlanError(f"--coding-speed is a number of GB/s such as 50, not {text!r}")
    return _positive(float(match[1]), "--coding-speed", text)


def _parse_replicas(text: str) -> int:
    if re.fullmatch(r"-?\d+", text.strip()) is None:
        raise PlanError(f"--replicas is a whole number of at least 2, not {text!r}")
    return int(text)


def _positive(number: float, option: str, text: str) -> float:
    if number <= 0:
        raise PlanError(f"{option} must be above 0, which {text!r} is not")
    return number


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
    parser.add_argument("--link", required=True, help="speed of one replica's link, such as 200Mbit or 10Gbps")
    parser.add_argument("--latency", required=True, help="of one message, one way (half a ping), such as 20ms")
    parser.add_argument(
        "--replicas", help="default: devices times num_nodes of the config, over the strategy's replica_size"
    )
    parser.add_argument(
        "--inner-link", help="speed of the link between the processes of a replica; default: --step-time has it"
    )
    parser.add_argument("--step-time", help="of a step without communication, such as 0.8s; default: measured here")
    parser.add_argument(
        "--sync-rate", help="share of the steps that synchronise, such as 0.2 or 20%%; default: a range"
    )
    parser.add_argument(
        "--coding-speed",
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
    options, fit_args = _build_parser().parse_known_args(_join_negatives(args))
    link = Link(parse_bit_rate(options.link), parse_duration(options.latency, "--latency"))
    step_seconds = parse_duration(options.step_time, "--step-time") if options.step_time is not None else None
    if step_seconds is not None:
        _positive(step_seconds, "--step-time", options.step_time)
    return PlanArguments(
        link,
        _parse_replicas(options.replicas) if options.replicas is not None else None,
        step_seconds,
        parse_share(options.sync_rate, "--sync-rate") if options.sync_rate is not None else None,
        _parse_speed(options.coding_speed) if options.coding_speed is not None else None,
        options.run,
        Link(parse_bit_rate(options.inner_link, "--inner-link"), 0.0) if options.inner_link is not None else None,
        fit_args,
    )


def _join_negatives(args: Sequence[str]) -> list[str]:
    """Join ``--latency -3ms``, whose value argparse would take for an option, into ``--latency=-3ms``."""
    joined: list[str] = []
    for word in args:
        if joined and joined[-1] in _OPTIONS and re.match(r"-\d", word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined
