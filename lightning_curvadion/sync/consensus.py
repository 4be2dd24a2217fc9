"""Consensus outside of a sync step: before validation, before a checkpoint, and at the end of fit."""

from collections.abc import Iterable

from torch import Tensor

from ..optim.curvadion import CurvaDion
from ..optim.optimizer_state import set_step_counts, state_tensors, trainable_parameters
from .collectives import Collectives
from .module_buffers import ModuleBuffers
from .parameter_payloads import ParameterPayloads
from .payloads import Payload, full_width_payloads


class Consensus:
    """An exact average of the replicas at full width, whatever the settings of the sync step.

    Nothing is sent twice: an optimizer that has not stepped since its last consensus is left out.

    Args:
        collectives: Of the process group.
        parameters: Makes the payloads of parameters.
        buffers: Of the module.
    """

    def __init__(self, collectives: Collectives, parameters: ParameterPayloads, buffers: ModuleBuffers) -> None:
        self._collectives = collectives
        self._parameters = parameters
        self._buffers = buffers
        # Optimizers in consensus since their last step, and whether with their state.
        self._reached: dict[CurvaDion, bool] = {}

    def lose(self, optimizer: CurvaDion) -> None:
        """A step, or a loaded state, ends the consensus of an optimizer."""
        self._reached.pop(optimizer, None)

    def reached_in_step(self, optimizer: CurvaDion) -> None:
        """A sync step has averaged the parameters of an optimizer, and not its state."""
        self._reached[optimizer] = False

    def reach(self, optimizers: Iterable[CurvaDion], include_state: bool) -> None:
        """Average what is not in consensus yet.

        Args:
            optimizers: The attached optimizers, the same on every rank.
            include_state: Also average their state and flush the error-feedback residuals.
        """
        buffers = self._buffers.synchronize_changed()
        for optimizer in optimizers:
            with_state = self._reached.get(optimizer)
            if with_state or (with_state is False and not include_state):
                continue
            self._average(optimizer, buffers, include_state, stepped=with_state is None)
            buffers = {}
            self._reached[optimizer] = include_state
        if buffers:
            self.average(buffers)

    def average(self, tensors: dict[str, Tensor]) -> None:
        """Replace tensors by their mean over the replicas, integer tensors by rank 0's."""
        self._collectives.average(self._full_width(tensors))

    def _average(self, optimizer: CurvaDion, others: dict[str, Tensor], include_state: bool, stepped: bool) -> None:
        optimizer.init_state()
        trainable = trainable_parameters(optimizer)
        due = dict(trainable) if stepped else {}
        state: dict[str, Tensor] = {}
        if include_state:
            state = state_tensors(optimizer)
            # A parameter that was frozen since its last sync step still has a residual.
            due.update((name, p) for name, p in optimizer.named_parameters() if "residual" in optimizer.state[p])
            frozen = {name: p for name, p in optimizer.named_parameters() if not p.requires_grad and name not in due}
            others = {**others, **frozen, **state}
        payloads = self._parameters.of(optimizer, due, "float32", flush_residuals=include_state, outer_step=stepped)
        self._collectives.average([*payloads, *self._full_width(others)])
        if include_state:
            set_step_counts(optimizer, state)
            optimizer.replicas_share_state()
            # A run that resumes has no other anchors than the parameters.
            self._parameters.anchors.drop(trainable.values())

    def _full_width(self, tensors: dict[str, Tensor]) -> list[Payload]:
        return full_width_payloads(tensors, self._collectives.rank, self._collectives.world_size)
