"""What parameters send: themselves, or their displacement from the last consensus with error feedback."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..optim.curvadion import CurvaDion
from .anchors import Anchors
from .drift import DriftMeter
from .outer_step import OuterStep
from .payloads import DisplacementPayload, Payload, TensorPayload
from .settings import SyncSettings


class ParameterPayloads:
    """Makes the payloads of parameters.

    Args:
        settings: Of the hook.

    Attributes:
        anchors: The last consensus, where the settings need it.
        meter: Measures the drift; ``None`` until it is asked for.
    """

    def __init__(self, settings: SyncSettings) -> None:
        self._settings = settings
        self.anchors = Anchors()
        self.meter: DriftMeter | None = None

    def of(
        self,
        optimizer: CurvaDion,
        parameters: Mapping[str, Tensor],
        wire_format: str,
        flush_residuals: bool = False,
        outer_step: bool = True,
    ) -> list[Payload]:
        """The payloads of some parameters.

        Args:
            optimizer: Its state holds residuals and outer momenta.
            parameters: By name.
            wire_format: Format on the wire; a quantized one uses and updates the residuals.
            flush_residuals: With ``"float32"``, send the residuals too and delete them.
            outer_step: Whether an outer step is due.
        """
        if self.meter is not None and parameters:
            self.meter.start()
        if not self._settings.needs_anchors:
            return [TensorPayload(name, parameter, meter=self.meter) for name, parameter in parameters.items()]
        self.anchors.capture(parameters.values())
        payloads: list[Payload] = []
        for name, parameter in parameters.items():
            state = optimizer.state[parameter]
            residual = state.pop("residual", None) if flush_residuals else None
            if wire_format != "float32":
                if "residual" not in state:
                    dtype = self._settings.dtype_of_residuals
                    state["residual"] = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
                residual = state["residual"]
            step = (
                OuterStep(state, parameter, self._settings.outer_lr, self._settings.outer_momentum)
                if outer_step and self._settings.has_outer_step
                else None
            )
            anchor = self.anchors.of(parameter)
            payloads.append(DisplacementPayload(name, parameter, anchor, wire_format, residual, step, self.meter))
        return payloads
