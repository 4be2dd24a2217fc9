"""What of an optimizer the replicas have in common, or can: names and tensors for a meeting."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..optim.curvadion import CurvaDion


def trainable(optimizer: CurvaDion) -> dict[str, Tensor]:
    """Parameters that are trained, by name."""
    return {name: parameter for name, parameter in optimizer.named_parameters() if parameter.requires_grad}


def state_tensors(optimizer: CurvaDion) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Floating-point state that replicas may share, by name, and one integer tensor with all step counts."""
    floating: dict[str, Tensor] = {}
    steps: list[int] = []
    device = torch.device("cpu")
    for parameter_name, parameter in optimizer.named_parameters():
        device = parameter.device
        state = optimizer.state[parameter]
        for name in sorted(state):
            if isinstance(state[name], Tensor) and name != "residual":
                floating[f"{name} of {parameter_name}"] = state[name]
        steps += [state["step"]] if "step" in state else []
    return floating, [torch.tensor(steps, dtype=torch.int64, device=device)] if steps else []


def write_back_steps(optimizer: CurvaDion, integers: Sequence[Tensor]) -> None:
    """Take over the step counts of :func:`state_tensors` once they have met."""
    counted = [state for _, p in optimizer.named_parameters() if "step" in (state := optimizer.state[p])]
    for state, step in zip(counted, integers[0].tolist() if integers else (), strict=False):
        state["step"] = step
