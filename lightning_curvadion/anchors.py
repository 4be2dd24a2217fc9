"""Where the replicas last agreed: what a replica's parameters moved since then is its displacement."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import dion
from .stacks import MatrixStack


class Anchors:
    """A copy of the consensus, one tensor for each parameter: the memory that coding or an outer step costs."""

    def __init__(self) -> None:
        self._anchor: dict[Tensor, Tensor] = {}

    def capture(self, parameters: Iterable[Tensor]) -> None:
        """Anchor the parameters that have no anchor yet where they are."""
        for parameter in parameters:
            if parameter not in self._anchor:
                self._anchor[parameter] = parameter.detach().clone()

    def drop(self, parameters: Iterable[Tensor]) -> None:
        """Forget the anchors, since the parameters were set to something else."""
        for parameter in parameters:
            self._anchor.pop(parameter, None)

    def displacement(self, parameter: Tensor) -> Tensor:
        """``X - anchor`` in float32 at least."""
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        return parameter.detach().to(dtype) - self._anchor[parameter].to(dtype)

    def move(self, parameter: Tensor, displacement: Tensor) -> None:
        """Set parameter and anchor to ``anchor + displacement``: the same bits on all replicas."""
        anchor = self._anchor[parameter]
        anchor.add_(displacement)
        parameter.copy_(anchor)

    def stacked_displacement(self, stack: MatrixStack) -> Tensor:
        """Displacements of a stack, shape (k, m, n) with m >= n."""
        displacement = torch.stack([self.displacement(parameter) for parameter in stack.parameters])
        return displacement.mT if stack.wide else displacement

    def move_through_factors(self, stack: MatrixStack, P: Tensor, own_R: Tensor, R: Tensor) -> None:
        """Replace the part of each displacement in the span of P by the mean's: ``X += P (R - own_R)^T``.

        What lies outside the span is not lost: it stays in the replica's parameters, and so in its next displacement.

        Args:
            stack: The matrices.
            P: Orthonormal, shape (k, m, r), the same on all replicas.
            own_R: ``D^T P`` of this replica's displacement D, shape (k, n, r).
            R: Its mean over the replicas.
        """
        changes, moves = P @ (R - own_R).mT, P @ R.mT
        if stack.wide:
            changes, moves = changes.mT, moves.mT
        for parameter, change, move in zip(stack.parameters, changes, moves, strict=True):
            parameter.add_(change)
            self._anchor[parameter].add_(move)


def outer_step(displacements: Sequence[Tensor], states: Sequence[dict[str, Any]], lr: float, momentum: float) -> None:
    """Turn averaged displacements into outer steps, in place: SGD with Nesterov momentum, as in DiLoCo.

    Douillard et al., 2023, arXiv:2311.08105, algorithm 1, with the displacement as the negative outer gradient:
    ``v = momentum v + d``, step ``lr (d + momentum v)``.

    Args:
        displacements: Means over the replicas.
        states: ``state[p]`` of each parameter, where v is kept as ``"outer_momentum"``.
        lr: Outer learning rate.
        momentum: Outer momentum, 0 for none.
    """
    for displacement, state in zip(displacements, states, strict=True):
        if momentum:
            velocity = state.setdefault("outer_momentum", torch.zeros_like(displacement))
            velocity.mul_(momentum).add_(displacement)
            displacement.add_(velocity, alpha=momentum)
        displacement.mul_(lr)


def displacement_left_factor(anchors: Anchors, stack: MatrixStack) -> Tensor:
    """``D Q``: local Dion steps are sums of P Q^T, so the momentum's Q is a good sketch of the displacement too."""
    displacement = anchors.stacked_displacement(stack)
    return dion.left_factor(displacement, stack.Q.to(displacement.dtype))
