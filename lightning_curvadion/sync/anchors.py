"""Anchors: a copy of the last consensus, from which the displacement of a replica is measured."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..optim.matrix_stacks import MatrixStack
from ..optim.shards import local_of

if TYPE_CHECKING:
    from .mean_record import MeanRecorder


class Anchors:
    """The last consensus, one tensor a parameter. Quantized formats, outer steps and drift need this memory.

    Of a sharded parameter it is that of the rows which this process holds.

    Attributes:
        moves: How often an anchor was set or may have moved, for what is cached of their values.
        recorder: Records the means by which they move, for a replica that comes.
    """

    def __init__(self) -> None:
        self.moves = 0
        self.recorder: MeanRecorder | None = None
        self._anchor: dict[Tensor, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Memory of all anchors, in bytes."""
        return sum(anchor.nbytes for anchor in self._anchor.values())

    def capture(self, parameters: Iterable[Tensor]) -> None:
        """Make the present values of parameters their anchors; they must be equal on all replicas."""
        self.moves += 1
        for parameter in parameters:
            own = local_of(parameter)
            if parameter not in self._anchor:
                # At least float32: a narrow parameter would round a mean of small displacements away.
                dtype = torch.promote_types(own.dtype, torch.float32)
                self._anchor[parameter] = torch.empty(own.shape, dtype=dtype, device=own.device)
            self._anchor[parameter].copy_(own.detach())

    def set_to_zero(self, parameters: Iterable[Tensor]) -> None:
        """Let the displacements of parameters be their whole values, which need no common anchor to be averaged."""
        if self.recorder is not None:
            # What moves them next is no mean of displacements.
            self.recorder.close()
        self.capture(parameters := list(parameters))
        for parameter in parameters:
            self._anchor[parameter].zero_()

    def drop(self, parameters: Iterable[Tensor]) -> None:
        """Forget the anchors of parameters that no longer move, or were set to something else."""
        for parameter in parameters:
            self._anchor.pop(parameter, None)

    def missing(self, parameters: Iterable[Tensor]) -> bool:
        """Whether any of the parameters has no anchor, or one of another shape than it has now."""
        return any(p not in self._anchor or self._anchor[p].shape != local_of(p).shape for p in parameters)

    def of(self, parameter: Tensor) -> Tensor:
        """The anchor of a parameter: contiguous, at least float32."""
        return self._anchor[parameter]

    def to_move(self, parameter: Tensor) -> Tensor:
        """The anchor of a parameter, for a caller that is about to move it."""
        self.moves += 1
        return self._anchor[parameter]

    def stacked_displacement(self, stack: MatrixStack) -> Tensor:
        """Displacements of a stack of matrices, shape (k, m, n) with m >= n."""
        return stack.oriented(stack.stacked([p.detach() - self._anchor[p] for p in stack.parameters]))

    def move_through_factors(self, stack: MatrixStack, P: Tensor, own_R: Tensor, R: Tensor) -> None:
        """Replace the part of each displacement in the span of P by the mean's: ``X += P (R - own_R)^T``.

        The part outside the span stays in the replica's parameters, and so in its next displacement.

        Args:
            stack: The matrices.
            P: Orthonormal, shape (k, m, r), the same on all replicas.
            own_R: What this replica sent of ``D^T P``, D its displacement; shape (k, n, r).
            R: The mean over the replicas of what they sent.
        """
        self.moves += 1
        products = P @ (R - own_R).mT, P @ R.mT
        changes, moves = (stack.like_parameters(stack.oriented(product)) for product in products)
        for parameter, change, move in zip(stack.parameters, changes, moves, strict=True):
            parameter.add_(change)
            self._anchor[parameter].add_(move)
