"""The outer step of DiLoCo: SGD with Nesterov momentum on the averaged displacement."""

from typing import Any

import torch
from torch import Tensor


class OuterStep:
    """The outer step of one parameter.

    Douillard et al., 2023, arXiv:2311.08105, algorithm 1. The averaged displacement d takes the place of the negative
    outer gradient: ``v = momentum v + d``, and the parameter moves by ``lr (d + momentum v)``.

    Args:
        state: ``state[p]``, where v is stored as ``"outer_momentum"``.
        parameter: The parameter.
        lr: Outer learning rate.
        momentum: Outer momentum, 0 for none.
    """

    def __init__(self, state: dict[str, Any], parameter: Tensor, lr: float, momentum: float) -> None:
        self._lr, self._momentum = lr, momentum
        self._velocity: Tensor | None = None
        if momentum:
            if "outer_momentum" not in state:
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                state["outer_momentum"] = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
            self._velocity = state["outer_momentum"].view(-1)

    def __call__(self, displacement: Tensor, start: int, stop: int) -> Tensor:
        """The step of the flat elements from ``start`` to ``stop``, given their averaged displacement."""
        if self._velocity is None:
            return displacement * self._lr
        velocity = self._velocity[start:stop].mul_(self._momentum).add_(displacement)
        return (displacement + self._momentum * velocity).mul_(self._lr)
