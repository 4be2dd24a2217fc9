"""Makes a plan: what a config would cost on a cluster, without the cluster."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ..errors import PlanError
from .arguments import PlanArguments
from .benchmark import measure_quantization, measure_training_step
from .collective_costs import Network
from .footprint import dion_step_traffic, measure_footprint
from .run_setup import RunSetup, read_run_setup
from .run_traffic import ConsensusPayload, measure_consensus
from .step_prediction import StepPrediction, ddp_step_seconds
from .sync_rate import choose_sync_rates


@dataclass(frozen=True)
class Plan:
    """A plan, with the source of each of its inputs in words.

    Attributes:
        setup: What is trained.
        steps: What its steps cost, at each sync rate: one that is given, or both ends of a range.
        consensus: What it sends outside of steps.
        sync_rate_source: Where the sync rates are from.
        compute_source: Where the time of a step without communication is from.
        quantization_source: Where the quantization times are from.
    """

    setup: RunSetup
    steps: Sequence[StepPrediction]
    consensus: ConsensusPayload
    sync_rate_source: str
    compute_source: str
    quantization_source: str


def make_plan(arguments: PlanArguments) -> Plan:
    """Read the config, dry-run its steps, and measure on this machine what the arguments leave open.

    Raises:
        PlanError: The config does not make a plan.
        ReportError: The logs to take the sync rate from cannot be read.

    Example:
        >>> from lightning_curvadion.cli.plan.arguments import parse_arguments
        >>> options = ["--link=1Gbit", "--latency=1ms", "--replicas=2", "--step-time=10ms", "--coding-speed=50"]
        >>> model = ["--model=lightning.pytorch.demos.boring_classes.BoringModel", "--optimizer=CurvaDion"]
        >>> plan = make_plan(parse_arguments([*options, *model]))
        >>> plan.steps[0].compute_seconds, plan.compute_source
        (0.01, 'from --step-time')
    """
    setup = read_run_setup(arguments.fit_args)
    replicas = _check_replicas(arguments.replicas if arguments.replicas is not None else setup.replicas)
    delays = setup.settings.lag, setup.settings.overlap
    rates, rate_source = choose_sync_rates(setup.optimizer._cap, arguments.sync_rate, arguments.run, delays[1])
    footprint = measure_footprint(setup.model, setup.optimizer, setup.settings, replicas)
    consensus = measure_consensus(setup.model, setup.optimizer, setup.settings, replicas)
    dion_traffic = dion_step_traffic(setup.model, setup.optimizer, replicas)
    formats = {*footprint.sync.numbers, *dion_traffic.numbers}
    quantization, quantization_source = _quantization_times(formats, arguments.quantization_speed)
    compute, compute_source = _compute_time(arguments.step_seconds, arguments.fit_args)
    if arguments.inner_link is not None:
        if setup.processes == 1:
            raise PlanError("--inner-link is of replicas of several processes: leave it out, or set replica_size")
        inside = Network(arguments.inner_link, setup.processes, setup.backend)
        compute = ddp_step_seconds(compute, footprint.buckets, inside)
        compute_source += ", with the all-reduce of gradients at --inner-link"
    network = Network(arguments.link, replicas, setup.backend)
    steps = [StepPrediction(footprint, dion_traffic, compute, quantization, network, rate, *delays) for rate in rates]
    return Plan(setup, steps, consensus, rate_source, compute_source, quantization_source)


def _check_replicas(replicas: int | None) -> int:
    if replicas is None:
        raise PlanError("the config leaves the number of devices to the machine: give --replicas")
    if replicas < 2:
        raise PlanError(f"--replicas must be at least 2, not {replicas}: a single replica sends nothing")
    return replicas


def _quantization_times(formats: Iterable[str], speed: float | None) -> tuple[dict[str, float], str]:
    """Seconds per number by wire format, and their source."""
    if speed is not None:
        return dict.fromkeys(formats, 4e-9 / speed), "from --coding-speed"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = f"measured on this machine's {device.type}; for other devices give --coding-speed"
    return {name: measure_quantization(name, device) for name in formats}, source


def _compute_time(step_seconds: float | None, fit_args: Sequence[str]) -> tuple[float, str]:
    """Seconds of a step without communication, and their source."""
    if step_seconds is not None:
        return step_seconds, "from --step-time"
    seconds, steps, device = measure_training_step(fit_args)
    source = f"median of {steps} steps measured on this machine's {device}; for other devices give --step-time"
    return seconds, source
