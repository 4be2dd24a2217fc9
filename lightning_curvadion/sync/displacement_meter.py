"""The displacement of a replica: how far its parameters have moved since the last consensus."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..optim.matrix_stacks import STACK_ELEMENTS
from ..optim.rmmc import tensor_norms
from ..optim.shards import Shards, local_of, whole_norms
from .anchors import Anchors


class DisplacementMeter:
    r"""Measures :math:`\|x - a\| / \|a\|` of the parameters x and their anchors a, without a wait for the device.

    A batch of parameters at a time, so that a measurement needs memory for one stack of matrices, or for the largest
    parameter.

    Args:
        anchors: The last consensus.
        shards: The processes that hold the parameters, which measure together; ``None`` where they are whole.

    Example:
        >>> anchors, parameters = Anchors(), [torch.tensor([3.0, 0.0]), torch.tensor([4.0])]
        >>> anchors.capture(parameters)
        >>> parameters[0].add_(torch.tensor([0.0, 1.0]))
        tensor([3., 1.])
        >>> round(DisplacementMeter(anchors).measure(parameters).item(), 4)
        0.2
    """

    def __init__(self, anchors: Anchors, shards: Shards | None = None) -> None:
        self._anchors, self._shards = anchors, shards
        # The norm of the anchors, and of which: it changes where an anchor moves, or other parameters are trained.
        self._norm: tuple[tuple[int, list[int]], Tensor] | None = None

    def measure(self, parameters: Sequence[Tensor]) -> Tensor:
        """The relative displacement: float64, shape (1,), on the device of the parameters.

        Infinite where a parameter is NaN, since a maximum over replicas may lose a NaN on some of them.

        Args:
            parameters: At least one; each has an anchor.
        """
        distances = [tensor_norms(self._displacements(batch)) for batch in _batches(parameters)]
        distance, norm = torch.cat(distances).norm().view(1), self._norm_of_anchors(parameters)
        if self._shards is not None:
            distance, norm = whole_norms(self._shards, [distance, norm])
        drift = distance / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        return drift.double().nan_to_num(nan=torch.inf, posinf=torch.inf)

    def _displacements(self, parameters: list[Tensor]) -> Sequence[Tensor]:
        own = [local_of(parameter) for parameter in parameters]
        starts = [self._anchors.of(parameter) for parameter in parameters]
        if starts[0].dtype != own[0].dtype:
            # A narrow parameter started from the rounded anchor, not from the anchor.
            rounded = [torch.empty_like(tensor) for tensor in own]
            torch._foreach_copy_(rounded, starts)
            starts = rounded
        return torch._foreach_sub(own, starts)

    def _norm_of_anchors(self, parameters: Sequence[Tensor]) -> Tensor:
        key = self._anchors.moves, list(map(id, parameters))
        if self._norm is None or self._norm[0] != key:
            norms = tensor_norms([self._anchors.of(parameter) for parameter in parameters])
            self._norm = key, norms.norm().view(1)
        return self._norm[1]


def _batches(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Split parameters into runs of one dtype and bounded size."""
    batch: list[Tensor] = []
    elements = 0
    for parameter in parameters:
        elements += parameter.numel()
        if batch and (elements > STACK_ELEMENTS or parameter.dtype != batch[0].dtype):
            yield batch
            batch, elements = [], parameter.numel()
        batch.append(parameter)
    yield batch
