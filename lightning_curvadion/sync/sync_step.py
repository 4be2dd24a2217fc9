"""The communication of a sync step: at most two means, each of everything at once, whatever the depth of the model.

A mean is one collective at full width or between two replicas, and two where more replicas send quantized numbers
(``payload_collectives.py``).

===================  =============================  ================================
momentum             first mean                     second mean
===================  =============================  ================================
``"factors"``        P, or B where smaller          R
``"dion"``           P, or B where smaller          R
``"average"``        B and Q
``"displacement"``
``"local"``
===================  =============================  ================================

===================  =============================  ================================
consensus            first mean                     second mean
===================  =============================  ================================
``"average"``                                       all parameters, buffers
``"factors"``        left displacement factors      right displacement factors, other parameters, buffers
``"none"``                                          gradients of the AdamW and Lion groups
===================  =============================  ================================

Where a step along common factors follows (momentum ``"factors"`` and ``"dion"``), the parameters are averaged just
before it. The result is the same, and it saves a collective.

Where a large embedding sends its moved rows alone, an all-gather of one bit a row comes before (``sparse_rows.py``).

An all-reduce of digests tells before which buffers differ, and only those are sent. Those of which no mean can be
formed, such as counters, follow in a broadcast from rank 0.

A mean of quantized tensors is written on all replicas or, where one of them holds a number that cannot be quantized, on
none. Each replica has taken its own step by then, and a first mean that succeeded stays.
"""

from collections.abc import Sequence

from torch import Tensor

from ..optim import dion
from ..optim.curvadion import CurvaDion
from .parameter_payloads import ParameterPayloads
from .payload_collectives import PayloadCollectives
from .payloads import FactorPayload, Payload, TensorPayload, full_width_payloads
from .quantization import bits_of
from .settings import SyncSettings
from .untrained_tensors import UntrainedTensors


class SyncStep:
    """The two means of a sync step.

    Args:
        settings: Of the hook.
        collectives: Of the process group.
        parameters: Makes the payloads of parameters.
        untrained: Tensors of the module that no step trains.
    """

    def __init__(
        self,
        settings: SyncSettings,
        collectives: PayloadCollectives,
        parameters: ParameterPayloads,
        untrained: UntrainedTensors,
    ) -> None:
        self._settings = settings
        self._collectives = collectives
        self._parameters = parameters
        self._untrained = untrained
        # Left displacement factors, computed in the first mean and used in the second.
        self._displacement_P: list[Tensor] = []

    def mean_left(self, optimizer: CurvaDion, factors: Sequence[Tensor], whole: Sequence[Tensor]) -> list[Tensor]:
        """The first mean; see ``SyncHook._mean_left``."""
        payloads = [self._factor("left factors of the momentum", factor) for factor in factors]
        sketches = []
        if self._settings.consensus == "factors":
            sketches = [
                # Local Dion steps are sums of P Q^T, so the momentum's Q is a good sketch of the displacement too.
                self._factor(
                    "left factors of the displacement", dion.left_factor(displacement, stack.Q.to(displacement.dtype))
                )
                for stack in optimizer.matrix_stacks()
                for displacement in [self._parameters.anchors.stacked_displacement(stack)]
            ]
        self._collectives.average([*payloads, *self._whole(whole), *sketches])
        self._displacement_P = [dion.orthonormalize(sketch.mean) for sketch in sketches]
        return [payload.mean for payload in payloads]

    def mean_right(self, optimizer: CurvaDion, factors: Sequence[Tensor], whole: Sequence[Tensor]) -> list[Tensor]:
        """The second mean, parameters and buffers included."""
        anchors = self._parameters.anchors
        payloads = [self._factor("right factors of the momentum", factor) for factor in factors]
        stacks = optimizer.matrix_stacks() if self._settings.consensus == "factors" else []
        own = [
            dion.right_factor(anchors.stacked_displacement(stack), P)
            for stack, P in zip(stacks, self._displacement_P, strict=True)
        ]
        displacements = [self._factor("right factors of the displacement", R) for R in own]
        untrained, from_rank_0 = full_width_payloads(self._collectives.differing(self.untrained(optimizer)))
        parameters = self._parameters_due(optimizer)
        self._collectives.average([*payloads, *self._whole(whole), *displacements, *parameters, *untrained])
        self._collectives.broadcast(from_rank_0)
        for stack, P, own_R, displacement in zip(stacks, self._displacement_P, own, displacements, strict=True):
            anchors.move_through_factors(stack, P, own_R, displacement.mean)
            if stack.steps_whole:
                # Nothing else turns Q, and a sketch that never turned would never see the rest of the displacement.
                stack.Q.copy_(dion.unit_columns(displacement.mean.to(stack.Q.dtype), stack.Q, stack.group["eps"])[1])
        self._displacement_P = []
        return [payload.mean for payload in payloads]

    def _factor(self, name: str, factor: Tensor) -> FactorPayload:
        return FactorPayload(f"{name}, {tuple(factor.shape)},", factor, self._settings.factor_format)

    def _whole(self, tensors: Sequence[Tensor]) -> list[Payload]:
        factor_format = self._settings.factor_format
        return [TensorPayload(f"momentum {tuple(tensor.shape)}", tensor, factor_format) for tensor in tensors]

    def _parameters_due(self, optimizer: CurvaDion) -> list[Payload]:
        """Parameters, where the consensus averages them."""
        if self._settings.consensus == "none":
            return []
        stacks = optimizer.matrix_stacks() if self._settings.consensus == "factors" else []
        factored = {parameter for stack in stacks for parameter in stack.parameters}
        return self._parameters.of_sync_step(optimizer, self._collectives.rows_to_send, leave_out=factored)

    def untrained(self, optimizer: CurvaDion) -> dict[str, Tensor]:
        """Untrained tensors that may differ between the replicas, where there is a consensus.

        In a wire format of few bits parameters are left to the consensus outside of sync steps: at full width, an EMA
        teacher would cost 28 times what the trained parameters cost. Until then it is no farther apart than these.
        """
        if self._settings.consensus == "none":
            return {}
        due = self._untrained.buffers()
        if bits_of(self._settings.wire_format) >= 16:
            due.update({**self._untrained.parameters_outside(), **self._parameters.untrained(optimizer)})
        return due
