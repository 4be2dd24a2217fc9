"""RecoveringHook: a step that another replica's loss cuts in half becomes a local step."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..optim.curvadion import CurvaDion
from .agreement import Agreed
from .errors import ReplicaLostError
from .recovery import Recovery
from .step_hook import StepHook

log = logging.getLogger(__name__)

T = TypeVar("T")


class RecoveringHook(StepHook):
    """A :class:`StepHook` whose steps survive the loss of a replica where it has a :class:`Recovery`.

    What is left of the step goes on as that of a lone replica, whose means are its own tensors. The survivors form a
    group at its end.
    """

    recovery: Recovery | None = None
    # Of the step under way.
    _alone = _cut_in_half = False
    # Of the optimizers' triggers, from the furthest replica, until the next joint step.
    _trigger_states: Sequence[Mapping[str, Any]] = ()

    def _agree(self, signal: Tensor) -> Agreed:
        self._alone = self.recovery is not None and not self.recovery.begin_step()
        if self._alone:
            return self._agreed_alone(signal)
        for optimizer, state in zip(self._optimizers, self._trigger_states, strict=False):
            optimizer._cap.load_state_dict(dict(state))
        self._trigger_states = ()
        return self._jointly(lambda: super(RecoveringHook, self)._agree(signal), lambda: self._agreed_alone(signal))

    def _agreed_alone(self, signal: Tensor) -> Agreed:
        self.agreement.agreed_request, self.agreement.agreed_to_settle = 0.0, False
        # With a lag an unusable gradient is left out, and nobody hears of it.
        return Agreed(code=0.0 if self._lag else float(signal[1]))

    def _may_sync(self, optimizer: CurvaDion) -> bool:
        return not self._alone and super()._may_sync(optimizer)

    def _confirm_step(self) -> float:
        return self._jointly(super()._confirm_step, lambda: 0.0)

    def _mean_left(self, optimizer: CurvaDion, factors: Sequence[Tensor], whole: Sequence[Tensor]) -> list[Tensor]:
        own = [factor.clone() for factor in factors] if self.recovery is not None else []
        return self._jointly(lambda: super(RecoveringHook, self)._mean_left(optimizer, factors, whole), lambda: own)

    def _mean_right(self, optimizer: CurvaDion, factors: Sequence[Tensor], whole: Sequence[Tensor]) -> list[Tensor]:
        own = [factor.clone() for factor in factors] if self.recovery is not None else []
        return self._jointly(lambda: super(RecoveringHook, self)._mean_right(optimizer, factors, whole), lambda: own)

    def _proceed(self, optimizer: CurvaDion) -> None:
        self._jointly(lambda: super(RecoveringHook, self)._proceed(optimizer), lambda: None)
        if self._cut_in_half:
            assert self.recovery is not None
            self._cut_in_half = False
            # The step is complete: a group that forms here finds the replica as between two steps.
            with torch.enable_grad():
                self.recovery.survive_step()

    def _jointly(self, operation: Callable[[], T], alone: Callable[[], T]) -> T:
        if self._alone:
            return alone()
        try:
            return operation()
        except ReplicaLostError as error:
            if self.recovery is None or not self.recovery.active:
                raise
            log.info(f"The step becomes a local one. {error}")
            self._alone = self._cut_in_half = True
            return alone()

    def resume_triggers(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Let the next joint step begin with these states of the optimizers' triggers."""
        self._trigger_states = states
