"""What a run would cost on a network, from what its steps send and how long they compute."""

import copy
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...optim.triggers import LocalStepCap
from .collective_costs import Collective, Network, break_even, ddp_step_seconds, step_seconds
from .footprint import Footprint, Traffic

# Mean and spread of ln RMMC over the second half of the main job, where RMMC has settled:
#   python -m lightning_curvadion fit --config configs/byte_gpt.yaml --trainer.log_every_n_steps=1
#   python -m lightning_curvadion plan --run lightning_logs/version_0 --config configs/byte_gpt.yaml --link 1Gbit ...
LOG_RMMC, LOG_SPREAD = -2.64, 0.44
_SIMULATED_STEPS = 20_000


def expected_sync_rate(cap: LocalStepCap, scale: float = 1.0, log_mean: float = LOG_RMMC) -> float:
    """Share of the steps at which a trigger fires, RMMC being log-normal as in the main job.

    Args:
        cap: The optimizer's trigger with its bound on local steps; a copy is asked.
        scale: Factor on RMMC.
        log_mean: Mean of ln RMMC.

    Example:
        >>> from lightning_curvadion import EveryNSteps, RMMCThreshold
        >>> expected_sync_rate(LocalStepCap(EveryNSteps(4), max_local_steps=50))
        0.25
        >>> expected_sync_rate(LocalStepCap(RMMCThreshold(1e9), max_local_steps=9))
        0.1
    """
    cap = copy.deepcopy(cap)
    generator = random.Random(0)
    fired = 0
    for _ in range(_SIMULATED_STEPS):
        fired += cap.decide(scale * generator.lognormvariate(log_mean, LOG_SPREAD))
    return fired / _SIMULATED_STEPS


@dataclass(frozen=True)
class Prediction:
    """What steps cost on a network.

    Args:
        footprint: What a step sends.
        dion: What a step sends that exchanges Dion's factors.
        compute: Seconds of a step that sends nothing, the optimizer's work included.
        coding: Seconds a number takes by wire format, see :func:`~lightning_curvadion.cli.plan.benchmark.coding_seconds`.
        network: Between the replicas.
        sync_rate: Share of the steps that synchronise.

    Example:
        >>> from lightning_curvadion.cli.plan.collective_costs import ALL_REDUCE, Link
        >>> traffic = [Traffic([Collective(ALL_REDUCE, nbytes)]) for nbytes in (16, 10**6, 4 * 10**6)]
        >>> network = Network(Link(1e8, latency=0.001), replicas=2)
        >>> sizes = Footprint(traffic[0], traffic[1], (4 * 10**6,), 0, 0, 0, 0, 0)
        >>> ours = Prediction(sizes, traffic[2], 0.1, {}, network, sync_rate=0.25)
        >>> [round(seconds, 3) for seconds in (ours.local, ours.sync, ours.mean, ours.ddp, ours.every_step)]
        [0.102, 0.186, 0.123, 0.437, 0.437]
    """

    footprint: Footprint
    dion: Traffic
    compute: float
    coding: Mapping[str, float]
    network: Network
    sync_rate: float

    def coding_of(self, traffic: Traffic) -> float:
        """Seconds of coding and decoding in a step."""
        return sum(self.coding[wire_format] * numbers for wire_format, numbers in traffic.numbers.items())

    def _seconds(self, traffic: Traffic) -> float:
        return step_seconds(self.compute, traffic.collectives, self.coding_of(traffic), self.network)

    @property
    def local(self) -> float:
        """Seconds of a local step."""
        return self._seconds(self.footprint.local)

    @property
    def sync(self) -> float:
        """Seconds of a sync step."""
        return self._seconds(self.footprint.sync)

    @property
    def mean(self) -> float:
        """Seconds of a step on average."""
        return self.sync_rate * self.sync + (1 - self.sync_rate) * self.local

    @property
    def ddp(self) -> float:
        """Seconds of a step under DistributedDataParallel."""
        return ddp_step_seconds(self.compute, self.footprint.buckets, self.network)

    @property
    def every_step(self) -> float:
        """Seconds of a step that exchanges Dion's factors in float32."""
        return self._seconds(self.dion)

    def sent(self, traffic: Traffic) -> float:
        """Bytes of payload that a replica puts on its link in a step."""
        return sum(self.network.sent(collective) for collective in traffic.collectives)

    @property
    def mean_sent(self) -> float:
        """The same on average."""
        both = self.sent(self.footprint.sync), self.sent(self.footprint.local)
        return self.sync_rate * both[0] + (1 - self.sync_rate) * both[1]

    @property
    def ddp_sent(self) -> float:
        """The same under DistributedDataParallel."""
        return self.network.sent(Collective("all-reduce", sum(self.footprint.buckets)))

    def at_speed(self, bits_per_second: float) -> "Prediction":
        """The same on links of another speed."""
        link = replace(self.network.link, bits_per_second=bits_per_second)
        return replace(self, network=replace(self.network, link=link))

    @property
    def speed_where_ddp_is_as_good(self) -> float | None:
        """In bit/s; ``None`` where one of the two is quicker at any speed."""
        return break_even(lambda speed: self.at_speed(speed).mean, lambda speed: self.at_speed(speed).ddp)
