"""How long steps take on a network: of CurvaDion, of DDP, and of Dion, which synchronises at every step."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ...sync.overlap import stage_ends
from .collective_costs import ALL_REDUCE, Collective, Network
from .dry_run import StepTraffic
from .footprint import Footprint

# A backward pass multiplies twice (by the weights and by the inputs) where the forward pass multiplies once.
BACKWARD_SHARE = 2 / 3


def ddp_step_seconds(compute: float, buckets: Sequence[int], network: Network) -> float:
    """Seconds of a step under DistributedDataParallel, which reduces gradients while backward still runs.

    Buckets become ready one after the other during the last ``BACKWARD_SHARE`` of the compute time, in proportion to
    their bytes. Each is reduced once it is ready and the one before is done, so the last one is never hidden (Li et
    al., 2020, arXiv:2006.15704, section 4.2.2).

    Args:
        compute: Seconds of a step without communication.
        buckets: Bytes of the gradient buckets, in the order in which they become ready.
        network: Between the replicas.

    Example::

        >>> from lightning_curvadion.cli.plan.collective_costs import FRAME_PAYLOAD, Link
        >>> network = Network(Link(8e6 / FRAME_PAYLOAD, latency=0.0), replicas=2)
        >>> ddp_step_seconds(3.0, [500_000, 500_000], network)
        3.5
        >>> ddp_step_seconds(3.0, [5_000_000, 5_000_000], network)
        12.0
    """
    now = ready = compute * (1 - BACKWARD_SHARE)
    for nbytes in buckets:
        ready += compute * BACKWARD_SHARE * nbytes / sum(buckets)
        now = max(now, ready) + network.seconds(Collective(ALL_REDUCE, nbytes))
    return max(now, compute)


def sequential_step_seconds(
    compute: float, collectives: Sequence[Collective], quantization: float, network: Network
) -> float:
    """Seconds of a step in which compute, quantization and collectives follow each other: CurvaDion's without delays.

    Args:
        compute: Seconds of a step without communication.
        collectives: What the step sends.
        quantization: Seconds of quantization and dequantization.
        network: Between the replicas.

    Example::

        >>> from lightning_curvadion.cli.plan.collective_costs import ALL_GATHER, FRAME_PAYLOAD, Link
        >>> network = Network(Link(8e6 / FRAME_PAYLOAD, latency=0.01), replicas=2)
        >>> sequential_step_seconds(1.0, [Collective(ALL_GATHER, 100_000)], quantization=0.02, network=network)
        1.19
    """
    return compute + quantization + sum(network.seconds(collective) for collective in collectives)


def lagged_step_seconds(compute: float, agreement: float, lag: int) -> float:
    """Seconds of a local step in a row of them, each of which waits for the agreement that began ``lag`` steps before.

    So ``lag`` agreements are under way at a time, and none can take longer than as many steps.

    Args:
        compute: Seconds of a step without communication.
        agreement: Seconds of an agreement.
        lag: With 0 a step waits for its own agreement.

    Example::

        >>> [lagged_step_seconds(0.1, agreement=0.3, lag=lag) for lag in (0, 1, 2, 3, 4)]
        [0.4, 0.3, 0.15, 0.1, 0.1]
    """
    return max(compute, agreement / lag) if lag else compute + agreement


def overlapped_waiting_seconds(stages: Sequence[float], overlap: int, step: float, period: float) -> float:
    """Seconds that replicas wait for a mean, of which each stage has some steps to arrive.

    Args:
        stages: Seconds of each stage.
        overlap: Steps that the mean may take. With 0 a sync step waits for all stages.
        step: Seconds of a step without the mean.
        period: Steps from one sync step to the next, which waits for what is left.

    Example::

        >>> seconds = [overlapped_waiting_seconds([0.1, 0.3], n, step=0.1, period=5.0) for n in (0, 1, 2, 4, 6, 8)]
        >>> [round(each, 3) for each in seconds]
        [0.4, 0.3, 0.2, 0.1, 0.1, 0.2]
    """
    ends = [min(end, period) for end in stage_ends(len(stages), overlap)]
    spans = (end - start for start, end in itertools.pairwise([0, *ends]))
    return sum(max(0.0, seconds - span * step) for seconds, span in zip(stages, spans, strict=True))


@dataclass(frozen=True)
class StepPrediction:
    """Seconds and bytes of steps on a network.

    Args:
        footprint: What a CurvaDion step sends.
        dion_traffic: What a step of Dion sends.
        compute_seconds: Of a step without communication, the optimizer's work included.
        seconds_per_number: Quantization time of one number by wire format, see
            :func:`~lightning_curvadion.cli.plan.benchmark.measure_quantization`.
        network: Between the replicas.
        sync_rate: Share of the steps that synchronise.
        lag: How many steps after it was sent an agreement is read.
        overlap: How many steps the mean of a sync step may take.

    Example:
        >>> from lightning_curvadion.cli.plan.collective_costs import MAXIMUM, Link
        >>> agreement, mean, dion = Collective(MAXIMUM, 16), *(Collective(ALL_REDUCE, n) for n in (10**6, 4 * 10**6))
        >>> local, sync = StepTraffic([agreement]), StepTraffic([agreement, mean], stages=[[mean]])
        >>> footprint = Footprint(local, sync, (4 * 10**6,), 0, 0, 0, 0, 0, 0)
        >>> network = Network(Link(1e8, latency=0.001), replicas=2)
        >>> steps = StepPrediction(footprint, StepTraffic([dion]), 0.1, {}, network, sync_rate=0.25)
        >>> seconds = (steps.local_seconds, steps.sync_seconds, steps.mean_seconds, steps.ddp_seconds)
        >>> [round(number, 3) for number in (*seconds, steps.dion_seconds)]
        [0.102, 0.188, 0.123, 0.437, 0.437]
        >>> hidden = steps.hidden()
        >>> hidden.lag, hidden.overlap, hidden.mean_seconds
        (1, 1, 0.1)
    """

    footprint: Footprint
    dion_traffic: StepTraffic
    compute_seconds: float
    seconds_per_number: Mapping[str, float]
    network: Network
    sync_rate: float
    lag: int = 0
    overlap: int = 0

    def quantization_seconds(self, traffic: StepTraffic) -> float:
        """Seconds of quantization and dequantization in a step."""
        return sum(self.seconds_per_number[wire_format] * numel for wire_format, numel in traffic.numbers.items())

    @property
    def local_seconds(self) -> float:
        """Seconds of a local step."""
        return lagged_step_seconds(self.compute_seconds, self.agreement_seconds, self.lag)

    @property
    def sync_seconds(self) -> float:
        """Seconds of a sync step, with all that replicas wait for its mean, in whatever step they do."""
        working = self.compute_seconds + self.quantization_seconds(self.footprint.sync)
        return working + self.sync_agreement_waiting + self.mean_waiting

    @property
    def period(self) -> float:
        """Steps from one sync step to the next."""
        return 1 / self.sync_rate if self.sync_rate else math.inf

    @property
    def agreement_waiting(self) -> float:
        """Seconds that a local step waits for an agreement."""
        return self.local_seconds - self.compute_seconds

    @property
    def sync_agreement_waiting(self) -> float:
        """Seconds that a sync step waits for an agreement: with a lag and without overlap for its own."""
        if not self.lag or self.overlap:
            return self.agreement_waiting
        return self.agreement_seconds - self._spared

    @property
    def mean_waiting(self) -> float:
        """Seconds that replicas wait for the mean of a sync step."""
        if not self.overlap:
            return self.mean_collective_seconds
        stages = [self._seconds(stage) for stage in self.footprint.sync.stages]
        waiting = overlapped_waiting_seconds(stages, self.overlap, self.local_seconds, self.period)
        return max(0.0, waiting - self._spared)

    @property
    def _spared(self) -> float:
        """Seconds that steps do not wait for agreements which arrive while a replica waits for a mean."""
        return min(self.lag, self.period - 1) * self.agreement_waiting

    @property
    def mean_collective_seconds(self) -> float:
        """Seconds of what a sync step sends beside its agreement."""
        after_agreement = self.footprint.sync.collectives[len(self.footprint.local.collectives) :]
        return self._seconds(after_agreement)

    def _seconds(self, collectives: Iterable[Collective]) -> float:
        """Seconds of collectives of the hook, one after the other."""
        return sum(map(self._own_network.seconds, collectives))

    @property
    def _own_network(self) -> Network:
        """The network as the hook uses it."""
        return replace(self.network, to_each=bool(self.lag or self.overlap))

    def hidden(self, overlaps: bool = True) -> "StepPrediction":
        """The same steps, with the smallest lag and overlap that leave as little waiting as any.

        Args:
            overlaps: Whether the settings allow an overlap.
        """
        lag = math.ceil(replace(self, lag=1).agreement_seconds / self.compute_seconds)
        lagged = replace(self, lag=lag)
        # As many steps as the longest stage takes, for each of them. After a whole period nothing is left to wait for.
        stages = self.footprint.sync.stages
        longest = max(map(lagged._seconds, stages), default=0.0)
        enough = min(len(stages) * math.ceil(longest / self.compute_seconds), self.period)
        candidates = [replace(lagged, overlap=overlap) for overlap in range(math.ceil(enough) + 1)]
        return min(candidates, key=lambda steps: steps.sync_seconds) if overlaps else lagged

    @property
    def mean_seconds(self) -> float:
        """Seconds of a step, averaged over sync steps and local steps."""
        return self.sync_rate * self.sync_seconds + (1 - self.sync_rate) * self.local_seconds

    @property
    def ddp_seconds(self) -> float:
        """Seconds of a step under DistributedDataParallel."""
        return ddp_step_seconds(self.compute_seconds, self.footprint.buckets, self.network)

    @property
    def dion_seconds(self) -> float:
        """Seconds of a Dion step, with factors in float32."""
        quantization = self.quantization_seconds(self.dion_traffic)
        return sequential_step_seconds(self.compute_seconds, self.dion_traffic.collectives, quantization, self.network)

    def link_bytes(self, traffic: StepTraffic) -> float:
        """Bytes of payload that a replica puts on its link in a step."""
        return sum(map(self._own_network.link_bytes, traffic.collectives))

    @property
    def agreement_seconds(self) -> float:
        """Seconds of an agreement."""
        return self._seconds(self.footprint.local.collectives)

    @property
    def mean_payload(self) -> float:
        """Payload of a step in bytes, averaged over sync steps and local steps."""
        sync, local = self.footprint.sync.bytes_sent, self.footprint.local.bytes_sent
        return self.sync_rate * sync + (1 - self.sync_rate) * local

    @property
    def mean_link_bytes(self) -> float:
        """Payload that a replica puts on its link, averaged over sync steps and local steps."""
        sync, local = self.link_bytes(self.footprint.sync), self.link_bytes(self.footprint.local)
        return self.sync_rate * sync + (1 - self.sync_rate) * local

    @property
    def ddp_link_bytes(self) -> float:
        """The same under DistributedDataParallel."""
        return self.network.link_bytes(Collective(ALL_REDUCE, sum(self.footprint.buckets)))

    def at_bit_rate(self, bits_per_second: float) -> "StepPrediction":
        """The same steps on links of another speed."""
        link = replace(self.network.link, bits_per_second=bits_per_second)
        return replace(self, network=replace(self.network, link=link))
