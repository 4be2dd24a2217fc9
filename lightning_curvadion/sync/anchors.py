"""Where the replicas last agreed: what a replica's parameters moved since then is its displacement."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..optim.matrix_stacks import MatrixStack


class Anchors:
    """A copy of the consensus, one tensor for each parameter: the memory that coding or an outer step costs."""

    def __init__(self) -> None:
        self._anchor: dict[Tensor, Tensor] = {}

    def capture(self, parameters: Iterable[Tensor]) -> None:
        """Anchor the parameters that have no anchor yet where they are."""
        for parameter in parameters:
            if parameter not in self._anchor:
                # In float32 at least: a mean of small moves must not be rounded away in a narrow parameter.
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                anchor = torch.empty(parameter.shape, dtype=dtype, device=parameter.device)
                self._anchor[parameter] = anchor.copy_(parameter.detach())

    def drop(self, parameters: Iterable[Tensor]) -> None:
        """Forget the anchors, since the parameters were set to something else."""
        for parameter in parameters:
            self._anchor.pop(parameter, None)

    def of(self, parameter: Tensor) -> Tensor:
        """The anchor of a parameter, contiguous, in float32 at least."""
        return self._anchor[parameter]

    def stacked_displacement(self, stack: MatrixStack) -> Tensor:
        """Displacements of a stack, shape (k, m, n) with m >= n."""
        displacement = torch.stack([parameter.detach() - self._anchor[parameter] for parameter in stack.parameters])
        return displacement.mT if stack.wide else displacement

    def move_through_factors(self, stack: MatrixStack, P: Tensor, own_R: Tensor, R: Tensor) -> None:
        """Replace the part of each displacement in the span of P by the mean's: ``X += P (R - own_R)^T``.

        What lies outside the span is not lost: it stays in the replica's parameters, and so in its next displacement.

        Args:
            stack: The matrices.
            P: Orthonormal, shape (k, m, r), the same on all replicas.
            own_R: What this replica sent of ``D^T P``, D its displacement; shape (k, n, r).
            R: The mean of what the replicas sent.
        """
        changes, moves = P @ (R - own_R).mT, P @ R.mT
        if stack.wide:
            changes, moves = changes.mT, moves.mT
        for parameter, change, move in zip(stack.parameters, changes, moves, strict=True):
            parameter.add_(change)
            self._anchor[parameter].add_(move)


class OuterStep:
    """Turns the averaged displacement of a parameter into an outer step: SGD with Nesterov momentum, as in DiLoCo.

    Douillard et al., 2023, arXiv:2311.08105, algorithm 1, with the displacement as the negative outer gradient:
    ``v = momentum v + d``, step ``lr (d + momentum v)``.

    Args:
        state: ``state[p]``, where v is kept as ``"outer_momentum"``.
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
        """The step for a range of the flat elements."""
        if self._velocity is None:
            return displacement * self._lr
        velocity = self._velocity[start:stop].mul_(self._momentum).add_(displacement)
        return (displacement + self._momentum * velocity).mul_(self._lr)
