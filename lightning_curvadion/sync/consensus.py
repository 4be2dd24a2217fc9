"""Consensus outside of a sync step: before validation, before a checkpoint, and at the end of fit."""

from collections.abc import Iterable, Mapping
from enum import IntEnum

import torch
from torch import Tensor

from ..optim.curvadion import CurvaDion
from ..optim.optimizer_state import averageable_state, set_averaged_state
from .digests import digest
from .parameter_payloads import ParameterPayloads
from .payload_collectives import PayloadCollectives
from .payloads import Payload, full_width_payloads
from .untrained_tensors import UntrainedTensors


class Reached(IntEnum):
    """What the replicas have in common since the last step of an optimizer; each member includes those before it."""

    NOTHING = 0
    QUANTIZED_PARAMETERS = 1
    PARAMETERS = 2
    STATE = 3


class Consensus:
    """An exact average of the replicas at full width, whatever the settings of the sync step.

    The error-feedback residuals are flushed into the parameters, so that every consensus is the same model, whether it
    is validated, saved or returned. Nothing is sent twice: what is in consensus since the last step is left out. So is
    an untrained tensor that a comparison of digests finds equal on all replicas.

    Args:
        collectives: Of the process group.
        parameters: Makes the payloads of parameters.
        untrained: Tensors of the module that no step trains.
    """

    def __init__(
        self, collectives: PayloadCollectives, parameters: ParameterPayloads, untrained: UntrainedTensors
    ) -> None:
        self._collectives = collectives
        self._parameters = parameters
        self._untrained = untrained
        self._reached: dict[CurvaDion, Reached] = {}
        # Optimizers whose parameters were set to something else than their last step left in them.
        self._unsettled: set[CurvaDion] = set()
        # Digests of the parameters from which an unsettled optimizer goes on.
        self._starts: dict[CurvaDion, list[Tensor]] = {}

    def lose(self, optimizer: CurvaDion) -> None:
        """A step ends the consensus of an optimizer."""
        self._reached.pop(optimizer, None)

    def reached_in_step(self, optimizer: CurvaDion) -> None:
        """A sync step has averaged the parameters of an optimizer, up to their error-feedback residuals."""
        self._reached[optimizer] = Reached.QUANTIZED_PARAMETERS

    # -- parameters that were set to something else -----------------------------------------------------------------

    def unsettle(self, optimizer: CurvaDion) -> None:
        """Note that parameters of an optimizer were set to something else, perhaps not to the same on all replicas."""
        self.lose(optimizer)
        self._unsettled.add(optimizer)
        self._starts.pop(optimizer, None)
        self._parameters.anchors.drop(parameter for _, parameter in optimizer.named_parameters())

    def is_unsettled(self, optimizer: CurvaDion) -> bool:
        """Whether replicas may disagree on where the next displacements of its parameters start."""
        return optimizer in self._unsettled or self._parameters.lack_anchors(optimizer)

    def prepare_to_settle(self, optimizer: CurvaDion) -> None:
        """Note where an unsettled optimizer goes on from, and measure displacements from there.

        With a lag a step changes the parameters before the replicas know that they settle.
        """
        if optimizer in self._starts and not self._parameters.lack_anchors(optimizer):
            return
        self._unsettled.add(optimizer)
        self._starts[optimizer] = [digest(parameter) for _, parameter in optimizer.named_parameters()]
        self._parameters.capture_anchors(optimizer)

    def settle(self, optimizer: CurvaDion) -> None:
        """Make the parameters of an optimizer equal at full width, by their values.

        Quantized displacements would take many sync steps over a distance that was not walked in steps. Where the
        replicas went on from equal parameters, as after a rollback to one checkpoint, nothing is sent.
        """
        parameters = dict(optimizer.named_parameters())
        starts = self._starts.pop(optimizer, None) or [digest(parameter) for parameter in parameters.values()]
        differing = self._collectives.where_digests_differ(parameters, starts)
        self._unsettled.discard(optimizer)
        if differing:
            self._collectives.average(self._parameters.by_value(optimizer, differing))
            self._parameters.capture_anchors(optimizer)

    # -- reaching ----------------------------------------------------------------------------------------------------

    def reach(self, optimizers: Iterable[CurvaDion], include_state: bool) -> None:
        """Average what is not in consensus yet.

        Args:
            optimizers: The attached optimizers, the same on every rank.
            include_state: Also average their state.
        """
        if self._collectives.world_size == 1:
            return
        self._untrained.reshard()
        optimizers = list(optimizers)
        for optimizer in optimizers:
            optimizer.init_state()
        untrained = self._untrained_of(optimizers)
        device = next(optimizers[0].members())[1].device
        so_far = [self._reached.get(optimizer, Reached.NOTHING) for optimizer in optimizers]
        progress = {"consensus so far": torch.tensor(so_far, device=device)}
        anchors = {f"anchors {number}": self._anchors_digest(o) for number, o in enumerate(optimizers)}
        differing = self._collectives.differing({**untrained, **anchors, **progress})
        others = {name: tensor for name, tensor in untrained.items() if name in differing}
        wanted = Reached.STATE if include_state else Reached.PARAMETERS
        for number, optimizer in enumerate(optimizers):
            # A replica alone may have noticed that its parameters were set to something else.
            agreed = not differing.keys() & progress.keys()
            reached = self._reached.get(optimizer, Reached.NOTHING) if agreed else Reached.NOTHING
            if reached < wanted:
                payloads = self._parameters.of_consensus(
                    optimizer, stepped=reached == Reached.NOTHING, by_value=f"anchors {number}" in differing
                )
                self._average_with(payloads, others, optimizer if include_state else None)
                self._parameters.arrived(optimizer)
                others = {}
                self._reached[optimizer] = wanted
                self._unsettled.discard(optimizer)
                self._starts.pop(optimizer, None)
        if others:
            self._average_with([], others)

    def average(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace tensors that differ by their mean over the replicas, integer tensors by rank 0's."""
        self._average_with([], self._collectives.differing(tensors))

    def _untrained_of(self, optimizers: Iterable[CurvaDion]) -> dict[str, Tensor]:
        untrained = {**self._untrained.buffers(), **self._untrained.parameters_outside()}
        for number, optimizer in enumerate(optimizers):
            frozen = self._parameters.untrained(optimizer)
            untrained.update((f"{name} of optimizer {number}", parameter) for name, parameter in frozen.items())
        return untrained

    def _anchors_digest(self, optimizer: CurvaDion) -> Tensor:
        own = self._parameters.anchors_digest(optimizer)
        # Where they are missing, no two replicas agree: their parameters are then averaged by value.
        return self._collectives.joined_inside(torch.tensor(self._collectives.rank) if own is None else own)

    def _average_with(
        self, payloads: list[Payload], tensors: Mapping[str, Tensor], optimizer: CurvaDion | None = None
    ) -> None:
        """Average payloads and tensors, and the state of an optimizer."""
        state = averageable_state(optimizer) if optimizer is not None else {}
        means, from_rank_0 = full_width_payloads({**tensors, **state})
        self._collectives.average([*payloads, *means])
        self._collectives.broadcast(from_rank_0)
        if optimizer is not None:
            set_averaged_state(optimizer, state)
            optimizer.replicas_share_state()
            # A run that resumes has no other anchors than the parameters.
            self._parameters.capture_anchors(optimizer)
