r"""What communication costs: latency-bandwidth formulas for collectives, and for whole training steps.

A message of n bytes takes :math:`\alpha + n \beta` seconds, whoever sends it to whom: :math:`\alpha` is the latency of
one message, one way, and :math:`\beta` the seconds a byte takes on the link (Hockney, 1994, "The communication
challenge for MPP: Intel Paragon and Meiko CS-2"). Every replica has one link of that speed, which sends and receives
at the same time. The collectives are made of such messages as in Thakur, Rabenseifner and Gropp, 2005, "Optimization of
collective communication operations in MPICH" (below: TRG), the ring as in Patarasuk and Yuan, 2009, "Bandwidth optimal
all-reduce algorithms for clusters of workstations". The arithmetic of a reduction is part of the measured costs of
coding instead.

Not in the model: replicas of different speed, other traffic, lost packets, and the dynamics of TCP. Slow start takes a
few round trips of a message; behind a deep queue, acknowledgements wait for the data of the other direction.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ALL_REDUCE, ALL_GATHER, ALL_TO_ALL = "all-reduce", "all-gather", "all-to-all"
# Payload of a full Ethernet frame of 1500 bytes with TCP's timestamps, over what the link carries of it.
FRAME_PAYLOAD = 1448 / 1514
# Under gloo two replicas that send to each other at once partly take turns: the later one's notice that it is ready to
# receive waits behind what it sends. An all-gather of two replicas goes in two halves, and with one of them first in
# line the last half goes alone: 1.5 times the time of a duplex link. An all-to-all took 1.3 to 1.6 times as long in the
# lab of tests/test_plan.py, with four replicas, and all-gathers of two 1.0 to 1.5 times.
GLOO_TURNS = 1.5
# A backward pass multiplies twice (by the weights and by the inputs) where the forward pass multiplies once.
BACKWARD_SHARE = 2 / 3


@dataclass(frozen=True)
class Link:
    """The link of one replica.

    Args:
        bits_per_second: Its speed, in either direction.
        latency: Seconds that a message of no bytes takes, one way.

    Raises:
        ValueError: A speed that is not positive, or a negative latency.

    Example::

        >>> round(Link(bits_per_second=200e6, latency=0.02).seconds_per_byte * 1e6, 4)
        0.0418
    """

    bits_per_second: float
    latency: float

    def __post_init__(self) -> None:
        if not 0 < self.bits_per_second < math.inf:
            raise ValueError(f"a link needs a speed above 0 bit/s, not {self.bits_per_second}")
        if not 0 <= self.latency < math.inf:
            raise ValueError(f"a latency is a number of seconds >= 0, not {self.latency}")

    @property
    def seconds_per_byte(self) -> float:
        """Beta: seconds a byte of payload, the headers of its frame included."""
        return 8 / (self.bits_per_second * FRAME_PAYLOAD)


@dataclass(frozen=True)
class Collective:
    """One collective of one replica.

    Args:
        kind: ``"all-reduce"``, ``"all-gather"`` or ``"all-to-all"``.
        nbytes: Bytes of the buffer that is reduced, of the replica's own share of a gather, or of all that a replica
            has for itself and the others.
    """

    kind: str
    nbytes: int


def ring_all_reduce(nbytes: float, replicas: int, link: Link) -> float:
    r"""Seconds of an all-reduce around a ring: :math:`2 (p - 1) \alpha + 2 \frac{p - 1}{p} n \beta`.

    A reduce-scatter of p - 1 messages of n / p bytes and an all-gather of as many (Patarasuk and Yuan, 2009,
    section 3). No algorithm sends fewer bytes.

    Example::

        >>> ring_all_reduce(1e6, replicas=4, link=Link(8e6 / FRAME_PAYLOAD, latency=0.01))
        1.56
    """
    return 2 * (replicas - 1) * (link.latency + nbytes / replicas * link.seconds_per_byte)


def tree_all_reduce(nbytes: float, replicas: int, link: Link) -> float:
    r"""Seconds of an all-reduce along a tree: :math:`2 \lceil \lg p \rceil \alpha + 2 \frac{p - 1}{p} n \beta`.

    Rabenseifner's recursive halving and doubling (TRG, section 4.5). NCCL's double binary trees take as many
    latencies and 2 n beta (Sanders, Speck and Träff, 2009, "Two-tree algorithms for full
    bandwidth broadcast, reduction and scan").

    Example::

        >>> round(tree_all_reduce(16, replicas=1024, link=Link(1e9, latency=0.05)), 3)
        1.0
    """
    halves = math.ceil(math.log2(replicas))
    return 2 * halves * link.latency + 2 * (replicas - 1) / replicas * nbytes * link.seconds_per_byte


def ring_all_gather(nbytes: float, replicas: int, link: Link) -> float:
    r"""Seconds of an all-gather of n bytes from each, around a ring: :math:`(p - 1) (\alpha + n \beta)`.

    TRG, section 4.1, where n is the size of the result, p times the n here.

    Example::

        >>> ring_all_gather(1e6, replicas=3, link=Link(8e6 / FRAME_PAYLOAD, latency=0.01))
        2.02
    """
    return (replicas - 1) * (link.latency + nbytes * link.seconds_per_byte)


def tree_all_gather(nbytes: float, replicas: int, link: Link) -> float:
    r"""Seconds of an all-gather by recursive doubling: :math:`\lceil \lg p \rceil \alpha + (p - 1) n \beta`.

    TRG, section 4.1.

    Example::

        >>> tree_all_gather(1e6, replicas=4, link=Link(8e6 / FRAME_PAYLOAD, latency=0.01))
        3.02
    """
    return math.ceil(math.log2(replicas)) * link.latency + (replicas - 1) * nbytes * link.seconds_per_byte


def direct_all_to_all(nbytes: float, replicas: int, link: Link) -> float:
    r"""Seconds of an all-to-all of n bytes, n / p for each: :math:`\alpha + \frac{p - 1}{p} n \beta`.

    Everybody sends to everybody at once, as gloo and NCCL do. TRG, section 4.2, counts p - 1 latencies, one for each
    message; messages on their way at the same time wait for one.

    Example::

        >>> direct_all_to_all(1e6, replicas=4, link=Link(8e6 / FRAME_PAYLOAD, latency=0.01))
        0.76
    """
    return link.latency + (replicas - 1) / replicas * nbytes * link.seconds_per_byte if replicas > 1 else 0.0


@dataclass(frozen=True)
class Network:
    """So many replicas, each on a link of its own.

    Args:
        link: The link.
        replicas: How many.
        backend: ``"gloo"`` has rings, and takes turns where two replicas send to each other (``GLOO_TURNS``). Any other
            is taken to be NCCL, which has trees beside rings, takes what is quicker, and uses both directions at once.

    Raises:
        ValueError: Fewer than one replica.

    Example::

        >>> agreement = Collective(ALL_REDUCE, 16)
        >>> link = Link(1e9, latency=0.05)
        >>> [round(Network(link, 64, backend).seconds(agreement), 3) for backend in ("gloo", "nccl")]
        [6.3, 0.6]
    """

    link: Link
    replicas: int
    backend: str = "gloo"

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ValueError(f"a plan needs at least one replica, not {self.replicas}")

    def seconds(self, collective: Collective) -> float:
        """How long a collective takes, from when the last replica has joined it."""
        formulas: dict[str, list[Callable[[float, int, Link], float]]] = {
            ALL_REDUCE: [ring_all_reduce, tree_all_reduce],
            ALL_GATHER: [ring_all_gather, tree_all_gather],
            ALL_TO_ALL: [direct_all_to_all],
        }
        gloo = self.backend == "gloo"
        known = formulas[collective.kind][: 1 if gloo else None]
        both_ways = collective.kind == ALL_TO_ALL or (collective.kind == ALL_GATHER and self.replicas == 2)
        turns = GLOO_TURNS if gloo and both_ways else 1.0
        return min(formula(turns * collective.nbytes, self.replicas, self.link) for formula in known)

    def sent(self, collective: Collective) -> float:
        """Bytes of payload that one replica puts on its link for a collective."""
        others = self.replicas - 1
        shares = {ALL_REDUCE: 2 * others / self.replicas, ALL_GATHER: others, ALL_TO_ALL: others / self.replicas}
        return shares[collective.kind] * collective.nbytes


def ddp_step_seconds(compute: float, buckets: Sequence[int], network: Network) -> float:
    """Seconds of a step under DistributedDataParallel, which reduces gradients while backward still runs.

    The buckets become ready one after the other, in proportion to their bytes, over the last ``BACKWARD_SHARE`` of the
    computing; each is reduced when it is ready and the one before is through, so that the last one is never hidden (Li
    et al., 2020, arXiv:2006.15704, section 4.2.2).

    Args:
        compute: Seconds of a step that sends nothing.
        buckets: Bytes of the gradient buckets in the order in which they become ready.
        network: Between the replicas.

    Example::

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


def step_seconds(compute: float, collectives: Sequence[Collective], coding: float, network: Network) -> float:
    """Seconds of a step of ours: computing, collectives and coding follow each other, nothing overlaps.

    Args:
        compute: Seconds of a step that sends nothing.
        collectives: What it sends.
        coding: Seconds of coding and decoding.
        network: Between the replicas.

    Example::

        >>> network = Network(Link(8e6 / FRAME_PAYLOAD, latency=0.01), replicas=2)
        >>> step_seconds(1.0, [Collective(ALL_GATHER, 100_000)], coding=0.02, network=network)
        1.18
    """
    return compute + coding + sum(network.seconds(collective) for collective in collectives)


def break_even(ours: Callable[[float], float], theirs: Callable[[float], float]) -> float | None:
    """The link speed in bit/s at which two costs are equal, by bisection of its logarithm.

    Args:
        ours: Seconds of a step at a speed, less than theirs on slow links.
        theirs: The same for them.

    Returns:
        The speed between 1 kbit/s and 100 Tbit/s, or ``None`` where one of the two is the lower at both ends.

    Example::

        >>> round(break_even(lambda speed: 1.5 + 1e6 / speed, lambda speed: 1.0 + 1e9 / speed) / 1e9, 3)
        1.998
        >>> break_even(lambda speed: 1.0, lambda speed: 1.0 + 1e9 / speed)
    """

    def lead(exponent: float) -> float:
        return theirs(10**exponent) - ours(10**exponent)

    slow, fast = 3.0, 14.0
    if (lead(slow) > 0) == (lead(fast) > 0):
        return None
    for _ in range(60):
        middle = (slow + fast) / 2
        slow, fast = (middle, fast) if (lead(middle) > 0) == (lead(slow) > 0) else (slow, middle)
    return 10**slow
