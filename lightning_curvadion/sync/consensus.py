"""Consensus outside of a sync step: before validation, before a checkpoint, and at the end of fit."""

from collections.abc import Iterable
from enum import IntEnum

from torch import Tensor

from ..optim.curvadion import CurvaDion
from ..optim.optimizer_state import averageable_state, set_averaged_state, trainable_parameters
from .collectives import Collectives
from .module_buffers import ModuleBuffers
from .parameter_payloads import ParameterPayloads
from .payloads import Payload, full_width_payloads


class Reached(IntEnum):
    """What the replicas have in common since the last step of an optimizer; each member includes those before it."""

    NOTHING = 0
    QUANTIZED_PARAMETERS = 1
    PARAMETERS = 2
    STATE = 3


class Consensus:
    """An exact average of the replicas at full width, whatever the settings of the sync step.

    The error-feedback residuals are flushed into the parameters, so that every consensus is the same model, whether it
    is validated, saved or returned. Nothing is sent twice: what is in consensus since the last step is left out.

    Args:
        collectives: Of the process group.
        parameters: Makes the payloads of parameters.
        buffers: Of the module.
    """

    def __init__(self, collectives: Collectives, parameters: ParameterPayloads, buffers: ModuleBuffers) -> None:
        self._collectives = collectives
        self._parameters = parameters
        self._buffers = buffers
        self._reached: dict[CurvaDion, Reached] = {}

    def lose(self, optimizer: CurvaDion) -> None:
        """A step, or a loaded state, ends the consensus of an optimizer."""
        self._reached.pop(optimizer, None)

    def reached_in_step(self, optimizer: CurvaDion) -> None:
        """A sync step has averaged the parameters of an optimizer, up to their error-feedback residuals."""
        self._reached[optimizer] = Reached.QUANTIZED_PARAMETERS

    def reach(self, optimizers: Iterable[CurvaDion], include_state: bool) -> None:
        """Average what is not in consensus yet.

        Args:
            optimizers: The attached optimizers, the same on every rank.
            include_state: Also average their state.
        """
        if self._collectives.world_size == 1:
            return
        buffers = self._buffers.synchronize_changed()
        wanted = Reached.STATE if include_state else Reached.PARAMETERS
        for optimizer in optimizers:
            reached = self._reached.get(optimizer, Reached.NOTHING)
            if reached < wanted:
                self._average(optimizer, buffers, include_state, stepped=reached == Reached.NOTHING)
                buffers = {}
                self._reached[optimizer] = wanted
        if buffers:
            self.average(buffers)

    def average(self, tensors: dict[str, Tensor]) -> None:
        """Replace tensors by their mean over the replicas, integer tensors by rank 0's."""
        if self._collectives.world_size > 1:
            self._collectives.average(self._full_width(tensors))

    def _average(self, optimizer: CurvaDion, others: dict[str, Tensor], include_state: bool, stepped: bool) -> None:
        optimizer.init_state()
        trainable = trainable_parameters(optimizer)
        due = dict(trainable) if stepped else {}
        # A parameter that was frozen since its last sync step still has a residual.
        due.update((name, p) for name, p in optimizer.named_parameters() if "residual" in optimizer.state[p])
        state: dict[str, Tensor] = {}
        if include_state:
            state = averageable_state(optimizer)
            frozen = {name: p for name, p in optimizer.named_parameters() if not p.requires_grad and name not in due}
            others = {**others, **frozen, **state}
        payloads = self._parameters.of(optimizer, due, "float32", flush_residuals=True, outer_step=stepped)
        self._collectives.average([*payloads, *self._full_width(others)])
        if include_state:
            set_averaged_state(optimizer, state)
            optimizer.replicas_share_state()
            # A run that resumes has no other anchors than the parameters.
            self._parameters.anchors.drop(trainable.values())

    def _full_width(self, tensors: dict[str, Tensor]) -> list[Payload]:
        return full_width_payloads(tensors, self._collectives.rank, self._collectives.world_size)
