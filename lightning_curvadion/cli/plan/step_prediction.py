"""How long steps take on a network: of CurvaDion, of DDP, and of Dion, which synchronises at every step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

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
    """Seconds of a step in which compute, quantization and collectives follow each other, as in CurvaDion.

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

    Example:
        >>> from lightning_curvadion.cli.plan.collective_costs import Link
        >>> traffic = [StepTraffic([Collective(ALL_REDUCE, nbytes)]) for nbytes in (16, 10**6, 4 * 10**6)]
        >>> network = Network(Link(1e8, latency=0.001), replicas=2)
        >>> footprint = Footprint(traffic[0], traffic[1], (4 * 10**6,), 0, 0, 0, 0, 0)
        >>> steps = StepPrediction(footprint, traffic[2], 0.1, {}, network, sync_rate=0.25)
        >>> seconds = (steps.local_seconds, steps.sync_seconds, steps.mean_seconds, steps.ddp_seconds)
        >>> [round(number, 3) for number in (*seconds, steps.dion_seconds)]
        [0.102, 0.186, 0.123, 0.437, 0.437]
    """

    footprint: Footprint
    dion_traffic: StepTraffic
    compute_seconds: float
    seconds_per_number: Mapping[str, float]
    network: Network
    sync_rate: float

    def quantization_seconds(self, traffic: StepTraffic) -> float:
        """Seconds of quantization and dequantization in a step."""
        return sum(self.seconds_per_number[wire_format] * numel for wire_format, numel in traffic.numbers.items())

    def _seconds(self, traffic: StepTraffic) -> float:
        quantization = self.quantization_seconds(traffic)
        return sequential_step_seconds(self.compute_seconds, traffic.collectives, quantization, self.network)

    @property
    def local_seconds(self) -> float:
        """Seconds of a local step."""
        return self._seconds(self.footprint.local)

    @property
    def sync_seconds(self) -> float:
        """Seconds of a sync step."""
        return self._seconds(self.footprint.sync)

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
        return self._seconds(self.dion_traffic)

    def link_bytes(self, traffic: StepTraffic) -> float:
        """Bytes of payload that a replica puts on its link in a step."""
        return sum(self.network.link_bytes(collective) for collective in traffic.collectives)

    @property
    def agreement_seconds(self) -> float:
        """Seconds of what a local step sends."""
        return sum(self.network.seconds(collective) for collective in self.footprint.local.collectives)

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
