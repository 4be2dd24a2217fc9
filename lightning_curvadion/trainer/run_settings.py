"""The settings with which a run synchronises, as loggers store them."""

from typing import Any

from ..optim.curvadion import CurvaDion
from ..optim.triggers import Trigger
from ..sync.settings import SyncSettings


def describe_trigger(trigger: Trigger) -> str:
    """A trigger with its arguments, without its state.

    Example:
        >>> from lightning_curvadion import EveryNSteps
        >>> describe_trigger(EveryNSteps(4))
        'EveryNSteps(n=4)'
    """
    options = {name: value for name, value in vars(trigger).items() if name not in trigger._state}
    return f"{type(trigger).__name__}({', '.join(f'{name}={value}' for name, value in options.items())})"


def communication_settings(settings: SyncSettings, optimizer: CurvaDion, replicas: int) -> dict[str, Any]:
    """Settings of the sync hook and of the trigger, and the number of replicas: texts and numbers."""
    trigger = {"trigger": describe_trigger(optimizer.trigger), "max_local_steps": optimizer.max_local_steps}
    return {"replicas": replicas, **trigger, **vars(settings)}
