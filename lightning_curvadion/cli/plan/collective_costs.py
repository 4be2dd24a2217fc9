r"""How long a collective takes on a network, by the latency-bandwidth (alpha-beta) model.

A message of n bytes between any two replicas takes :math:`\alpha + n \beta` seconds. :math:`\alpha` is the latency of
one message, one way; :math:`\beta` is the time of a byte on the link (Hockney, 1994, "The communication challenge for
MPP: Intel Paragon and Meiko CS-2"). Every replica has one link of that speed, which sends and receives at the same
time. Collectives consist of such messages as in Thakur, Rabenseifner and Gropp, 2005, "Optimization of collective
communication operations in MPICH" (below: TRG). The ring is that of Patarasuk and Yuan, 2009, "Bandwidth optimal
all-reduce algorithms for clusters of workstations". The arithmetic of a reduction is not counted here: it is part of
the measured quantization time.

Not modelled: replicas of different speed, other traffic, lost packets, and the dynamics of TCP. A message takes a few
round trips of slow start. Behind a deep queue, acknowledgements wait for the data of the other direction.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from ...sync.collectives import DIRECT_BYTES

ALL_REDUCE, ALL_GATHER, ALL_TO_ALL, BROADCAST = "all-reduce", "all-gather", "all-to-all", "broadcast"
# The maximum over the replicas of an agreement's numbers, or of digests.
MAXIMUM = "maximum"
# Payload of a full Ethernet frame of 1500 bytes with TCP timestamps, over all bytes that the link carries for it.
FRAME_PAYLOAD = 1448 / 1514
# Under gloo, two replicas that send to each other at once partly take turns: the later one's notice that it is ready to
# receive waits behind the data it sends. An all-gather of two replicas goes in two halves; if one of them is first in
# line, the last half goes alone, which takes 1.5 times as long as on a duplex link. Measured in the network lab
# (tests/cli/plan/test_step_prediction.py): all-to-alls of four took 1.3 to 1.6 times as long, all-gathers of two 1.0 to
# 1.5 times.
GLOO_DUPLEX_FACTOR = 1.5
# Under gloo a message waits for the receiver's notice that it is ready, which takes a latency, where the notice was not
# sent ahead. So all kinds but an all-reduce and a maximum wait for more latencies than their messages. Measured in the
# network lab (python examples/benchmarks/latency.py).
GLOO_NOTICE = 1
# An all-reduce of so few bytes is one chunk of gloo's ring.
_SMALL_BYTES = 64


@dataclass(frozen=True)
class Link:
    """The link of one replica.

    Args:
        bits_per_second: Its speed, in either direction.
        latency: Seconds of an empty message, one way.

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
        """Beta: seconds per byte of payload, with its share of the frame's headers."""
        return 8 / (self.bits_per_second * FRAME_PAYLOAD)


@dataclass(frozen=True)
class Collective:
    """One collective, as one replica calls it.

    Args:
        kind: ``"all-reduce"``, ``"maximum"``, ``"all-gather"``, ``"all-to-all"`` or ``"broadcast"``.
        nbytes: Bytes of the replica's input: the buffer to reduce, the numbers, its share of a gather, its rows for all
            replicas, or what rank 0 broadcasts.
    """

    kind: str
    nbytes: int


def ring_all_reduce(nbytes: float, replicas: int, link: Link) -> float:
    r"""Seconds of an all-reduce around a ring: :math:`2 (p - 1) \alpha + 2 \frac{p - 1}{p} n \beta`.

    A reduce-scatter of p - 1 messages of n / p bytes, and an all-gather of as many (Patarasuk and Yuan, 2009,
    section 3). No algorithm sends fewer bytes.

    Example::

        >>> ring_all_reduce(1e6, replicas=4, link=Link(8e6 / FRAME_PAYLOAD, latency=0.01))
        1.56
    """
    return 2 * (replicas - 1) * (link.latency + nbytes / replicas * link.seconds_per_byte)


def small_ring_all_reduce(nbytes: float, replicas: int, link: Link) -> float:
    r"""Seconds of gloo's ring all-reduce of one chunk, one at every step: :math:`(p + 2) \alpha + 2 (p - 1) n \beta`.

    The chunk goes around the ring twice, to be reduced and to be handed out, and a replica starts its next step when it
    has been handed the result. The first replica of the ring does so p - 2 latencies before the last one. By the time
    the chunk of the next step comes around, every replica has computed. So a step takes one round, p latencies, and two
    for the first notice that a receiver is ready. With two replicas that notice is early: :math:`2 \alpha`. A single
    all-reduce, which all replicas start at the same time, takes :math:`(2 p - 1) \alpha`.

    Example::

        >>> [round(small_ring_all_reduce(16, p, Link(1e9, latency=0.05)), 2) for p in (1, 2, 3, 4, 8)]
        [0.0, 0.1, 0.25, 0.3, 0.5]
    """
    latencies = replicas + 2 if replicas > 2 else 2 * (replicas - 1)
    return latencies * link.latency + 2 * (replicas - 1) * nbytes * link.seconds_per_byte


def tree_all_reduce(nbytes: float, replicas: int, link: Link) -> float:
    r"""Seconds of an all-reduce along a tree: :math:`2 \lceil \lg p \rceil \alpha + 2 \frac{p - 1}{p} n \beta`.

    Rabenseifner's recursive halving and doubling (TRG, section 4.5). NCCL's double binary trees have the same latency
    term and 2 n beta (Sanders, Speck and Träff, 2009, "Two-tree algorithms for full bandwidth broadcast, reduction and
    scan").

    Example::

        >>> round(tree_all_reduce(16, replicas=1024, link=Link(1e9, latency=0.05)), 3)
        1.0
    """
    rounds = math.ceil(math.log2(replicas))
    return 2 * rounds * link.latency + 2 * (replicas - 1) / replicas * nbytes * link.seconds_per_byte


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

    Every replica sends to all others at once, as in gloo and NCCL. TRG, section 4.2, counts p - 1 latencies, one per
    message; messages that are on their way at the same time share one.

    Example::

        >>> direct_all_to_all(1e6, replicas=4, link=Link(8e6 / FRAME_PAYLOAD, latency=0.01))
        0.76
    """
    return link.latency + (replicas - 1) / replicas * nbytes * link.seconds_per_byte if replicas > 1 else 0.0


def tree_broadcast(nbytes: float, replicas: int, link: Link) -> float:
    r"""Seconds of a broadcast along a binomial tree: :math:`\lceil \lg p \rceil (\alpha + n \beta)`.

    TRG, section 4.4: the algorithm for few bytes, as the counters of a model are.

    Example::

        >>> tree_broadcast(1e6, replicas=4, link=Link(8e6 / FRAME_PAYLOAD, latency=0.01))
        2.02
    """
    return math.ceil(math.log2(replicas)) * (link.latency + nbytes * link.seconds_per_byte)


@dataclass(frozen=True)
class Network:
    """A number of replicas, each on a link of its own.

    Args:
        link: The link.
        replicas: Number of replicas.
        backend: ``"gloo"`` has rings, takes turns where two replicas send to each other (``GLOO_DUPLEX_FACTOR``), and
            sends no message before the receiver's notice (``GLOO_NOTICE``). Any other backend is taken for NCCL: rings
            or trees, whichever is faster, and both directions at once.
        to_each: Whether under gloo each replica sends few bytes that all are to know to each other one, as with a lag
            or an overlap (``Collectives.send_to_each``).

    Raises:
        ValueError: Fewer than one replica.

    Example::

        >>> agreement = Collective(MAXIMUM, 16)
        >>> link = Link(1e9, latency=0.05)
        >>> [round(Network(link, 64, backend).seconds(agreement), 3) for backend in ("gloo", "nccl")]
        [3.3, 0.6]
        >>> round(Network(link, 64, to_each=True).seconds(agreement), 3)
        0.1
    """

    link: Link
    replicas: int
    backend: str = "gloo"
    to_each: bool = False

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ValueError(f"a plan needs at least one replica, not {self.replicas}")

    def seconds(self, collective: Collective) -> float:
        """Duration of a collective, from when the last replica has joined it."""
        formulas: dict[str, list[Callable[[float, int, Link], float]]] = {
            ALL_REDUCE: [ring_all_reduce, tree_all_reduce],
            MAXIMUM: [ring_all_reduce, tree_all_reduce],
            ALL_GATHER: [ring_all_gather, tree_all_gather],
            ALL_TO_ALL: [direct_all_to_all],
            BROADCAST: [tree_broadcast],
        }
        if self.backend == "gloo":
            return self._gloo_seconds(collective, formulas[collective.kind][0])
        return min(algorithm(collective.nbytes, self.replicas, self.link) for algorithm in formulas[collective.kind])

    def _is_sent_to_each(self, collective: Collective) -> bool:
        is_told_to_all = collective.kind in (MAXIMUM, ALL_GATHER) and collective.nbytes <= DIRECT_BYTES
        return self.backend == "gloo" and self.to_each and is_told_to_all

    def _gloo_seconds(self, collective: Collective, algorithm: Callable[[float, int, Link], float]) -> float:
        kind, nbytes, others = collective.kind, collective.nbytes, self.replicas - 1
        if self._is_sent_to_each(collective):
            return self._gloo_seconds(Collective(ALL_TO_ALL, self.replicas * nbytes), direct_all_to_all)
        if kind == MAXIMUM and nbytes <= _SMALL_BYTES:
            return small_ring_all_reduce(nbytes, self.replicas, self.link)
        duplex = kind == ALL_TO_ALL or (kind == ALL_GATHER and self.replicas == 2)
        notices = {ALL_REDUCE: 0, MAXIMUM: 0, ALL_GATHER: others}.get(kind, min(1, others)) * GLOO_NOTICE
        factor = GLOO_DUPLEX_FACTOR if duplex else 1.0
        return algorithm(factor * nbytes, self.replicas, self.link) + notices * self.link.latency

    def link_bytes(self, collective: Collective) -> float:
        """Bytes of payload that rank 0 puts on its link for a collective."""
        others = self.replicas - 1
        reduced = 2 * others / self.replicas
        shares = {
            ALL_REDUCE: reduced,
            MAXIMUM: others if self._is_sent_to_each(collective) else reduced,
            ALL_GATHER: others,
            ALL_TO_ALL: others / self.replicas,
            BROADCAST: math.ceil(math.log2(self.replicas)),
        }
        return shares[collective.kind] * collective.nbytes
