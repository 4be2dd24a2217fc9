r"""Overlap: the mean of a sync step in the background, while the replicas train on.

A replica copies what it sends from, :math:`s_i`, and goes on stepping. With :math:`a` the anchor that the mean arrives
at, it ends the flight by

.. math:: x_i \leftarrow (x_i - s_i) + a ,

so that its own progress meanwhile, :math:`x_i - s_i`, stays, and is its displacement from then on. Streaming DiLoCo
(arXiv:2501.18512) found such a delay to be free in loss. Here a step or two are, and many are not
(``examples/benchmarks/README.md``).

A flight ends a fixed number of steps after it began, and not when its bytes have arrived: all replicas take over the
mean in the same step, and wait only if it is late. A sync that comes due meanwhile begins when the flight ends. A
flight has a process group of its own, so that its collectives cannot meet those of the steps in another order on
another rank. On a GPU they run on that group's stream.

Where replicas take different numbers of steps, a flight lasts for so many agreements in the place of steps. Its mean is
corrected by the weights that the first of them tells (``pace.py``).
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.profiler import record_function

from ..optim.curvadion import CurvaDion
from .digests import digest
from .parameter_payloads import ParameterPayloads
from .payload_collectives import PayloadCollectives
from .payloads import Payload, full_width_payloads, is_averaged
from .row_flags import indices_set_anywhere, packed_flags
from .sync_step import SyncStep
from .transfers import Transfer, complete, differing_in


class Flight:
    """One mean on its way.

    Args:
        collectives: Of a process group of its own.
        parameters: Makes the payloads.
        untrained: Untrained tensors that may differ between replicas, by name.
        optimizer: Its parameters are sent.
        steps: How many steps it may take.
    """

    def __init__(
        self,
        collectives: PayloadCollectives,
        parameters: ParameterPayloads,
        untrained: Mapping[str, Tensor],
        optimizer: CurvaDion,
        steps: int,
    ) -> None:
        self._collectives = collectives
        self._parameters = parameters
        self._untrained = dict(untrained)
        self._optimizer = optimizer
        self._due = parameters.due(optimizer)
        self._asks_first = bool(self._due.sparse or untrained)
        # By live tensor: the copy that travels, and becomes what arrives.
        self._sent = {p: p.detach().clone() for part in self._due.parts for p in part.values()}
        self._dense = parameters.of(
            optimizer, self._due.dense, correct=True, stand_ins=self._sent, weight=self._due.weight
        )
        self._dense += parameters.of_resting(optimizer, self._due.resting, self._sent)
        self._discarded = False
        # The sync step itself counts none.
        self._age, self._stage = -1, 0
        self._under_way: list[Transfer] = []
        self._stages = self._run()
        self._advance()
        self._ends = stage_ends(self._asks_first + collectives.rounds(self._dense), steps)

    def proceed(self) -> bool:
        """Count one step, and go on where a stage ends with it.

        Returns:
            Whether the mean is taken over.
        """
        self._age += 1
        while self._stage < len(self._ends) and self._ends[self._stage] <= self._age:
            self._advance()
            self._stage += 1
        return self._stage == len(self._ends)

    @property
    def ends_in_this_step(self) -> bool:
        """Whether the mean is taken over in the step that is taken now."""
        return self._age + 1 >= self._ends[-1]

    def finish(self) -> None:
        """Take the mean over now; every rank calls it after the same step."""
        self._age = max(self._ends)
        self.proceed()

    def discard(self) -> None:
        """Leave the parameters alone in the end: they were set to something else meanwhile."""
        self._discarded = True

    def _advance(self) -> None:
        # All are waited for before any of them goes on: in the last stage, nothing can fail between two writes.
        for transfer in self._under_way:
            transfer.wait()
        self._under_way = next(self._stages, [])

    def _run(self) -> Iterator[list[Transfer]]:
        """Starts collectives, yields them, and goes on when all of them have arrived."""
        rows: list[Tensor] = []
        payloads, from_rank_0 = self._dense, list[Tensor]()
        if self._asks_first:
            distances = self._parameters.row_distances(self._optimizer, self._due.sparse, self._sent)
            masks = self._collectives.moved_rows(distances)
            questions = [self._collectives.start_all_gather(packed_flags(masks))] if masks else []
            if self._untrained:
                digests = [digest(tensor) for tensor in self._untrained.values()]
                questions.append(self._collectives.start_comparison(self._untrained, digests))
            yield questions
            if masks:
                rows = indices_set_anywhere(questions[0].result, masks)
            differing = differing_in(questions[-1].result, self._untrained) if self._untrained else {}
            copies = {name: t.detach().clone() if is_averaged(t) else t for name, t in differing.items()}
            self._sent.update((tensor, copies[name]) for name, tensor in differing.items() if is_averaged(tensor))
            averaged, from_rank_0 = full_width_payloads(copies)
            payloads = [
                *self._dense,
                *self._parameters.of_rows(self._optimizer, self._due.sparse, rows, self._sent, self._due.weight),
                *averaged,
            ]
        yield from self._average(payloads)
        # Counters and codes, which seldom differ: for these the replicas wait.
        self._collectives.broadcast(from_rank_0)

    def _average(self, payloads: list[Payload]) -> Iterator[list[Transfer]]:
        means = list(self._collectives.means(payloads, later=True))
        for _ in range(self._collectives.rounds(payloads)):
            with record_function("curvadion::send"):
                under_way = [next(mean) for mean in means]
            yield under_way
        if self._collectives.anywhere_inside(self._discarded):
            return
        with record_function("curvadion::merge"), torch.no_grad():
            self._parameters.anchors.moves += 1
            for live, copy in self._sent.items():
                live.sub_(copy)
            try:
                for mean in means:
                    complete(mean)
                for payload in payloads:
                    payload.finish()
            finally:
                # Where a number could not be quantized, no copy has changed, and this puts everything back.
                for live, copy in self._sent.items():
                    live.add_(copy)


class Overlap:
    """The flights of the optimizers of a hook.

    Args:
        steps: How many steps a flight takes.
        parameters: Makes the payloads.
        sync_step: Knows what a sync step sends beside parameters.
    """

    def __init__(self, steps: int, parameters: ParameterPayloads, sync_step: SyncStep) -> None:
        self._steps = steps
        self._parameters = parameters
        self._sync_step = sync_step
        self._flights: dict[CurvaDion, Flight] = {}

    def may_start(self, optimizer: CurvaDion) -> bool:
        """Whether a flight may begin in this step. One that is under way goes on, so that nobody waits for it."""
        return optimizer not in self._flights or self.ends_in_this_step(optimizer)

    def ends_in_this_step(self, optimizer: CurvaDion) -> bool:
        """Whether a mean is taken over in the step that is taken now."""
        return optimizer in self._flights and self._flights[optimizer].ends_in_this_step

    def start(self, optimizer: CurvaDion, collectives: PayloadCollectives) -> None:
        """Begin the flight of a sync step. One that ends in this step ends first."""
        self.finish(optimizer)
        untrained = self._sync_step.untrained(optimizer)
        self._flights[optimizer] = Flight(collectives, self._parameters, untrained, optimizer, self._steps)

    def proceed(self, optimizer: CurvaDion) -> None:
        """Count a step of an optimizer."""
        if optimizer in self._flights and self._flights[optimizer].proceed():
            del self._flights[optimizer]
            self._parameters.arrived(optimizer)

    def finish(self, optimizer: CurvaDion) -> None:
        """End what is under way now; every rank calls it after the same step."""
        if optimizer in self._flights:
            self._flights.pop(optimizer).finish()
            self._parameters.arrived(optimizer)

    def discard(self, optimizer: CurvaDion) -> None:
        """Let what is under way change nothing, since the parameters were set to something else meanwhile."""
        if optimizer in self._flights:
            self._flights[optimizer].discard()

    def under_way(self, optimizer: CurvaDion) -> bool:
        """Whether a mean is under way."""
        return optimizer in self._flights


def stage_ends(stages: int, steps: int) -> list[int]:
    """The step at which each stage ends: they are spread over the steps of a flight, so that each has time to arrive.

    Example:
        >>> stage_ends(stages=2, steps=4), stage_ends(stages=2, steps=1)
        ([2, 4], [1, 1])
    """
    return [-(-(stage + 1) * steps // stages) for stage in range(stages)]
