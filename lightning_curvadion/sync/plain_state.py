"""What a replica that comes is told in words and numbers, for JSON: structure, hyperparameters and triggers."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..optim.curvadion import CurvaDion
from ..optim.parameter_groups import GROUP_OPTIONS
from .process_group_sync import ProcessGroupSync


def structure_of(sync: ProcessGroupSync) -> list[str]:
    """What two replicas must have in common to train together: all but values and hyperparameters."""
    lines = [f"hook {sync.settings}"]
    for optimizer in sync.optimizers:
        lines.append(f"trigger {type(optimizer.trigger).__name__}")
        lines += [f"{name} {tuple(p.shape)} {p.dtype}" for name, p in optimizer.named_parameters()]
    return lines


def plain_state(optimizers: Sequence[CurvaDion]) -> list[dict[str, Any]]:
    """What optimizers hold beside tensors and step counts: numbers and names, for JSON."""
    return [
        {
            "trigger": optimizer._cap.state_dict(),
            "groups": [{option: group[option] for option in GROUP_OPTIONS} for group in optimizer.param_groups],
        }
        for optimizer in optimizers
    ]


def load_plain_state(optimizers: Sequence[CurvaDion], states: Sequence[Mapping[str, Any]]) -> None:
    """Take over a :func:`plain_state`.

    Raises:
        ValueError: It is of other optimizers.
    """
    sizes = [len(optimizer.param_groups) for optimizer in optimizers]
    if sizes != [len(state["groups"]) for state in states]:
        raise ValueError(
            f"build the same optimizers in every process: here they have {sizes} parameter groups, in the run that this"
            f" replica joins {[len(state['groups']) for state in states]}"
        )
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer._cap.load_state_dict(state["trigger"])
        for group, options in zip(optimizer.param_groups, state["groups"], strict=True):
            group.update({option: options[option] for option in GROUP_OPTIONS}, betas=tuple(options["betas"]))
