"""What travels: a parcel says what one tensor sends and what becomes of the mean that comes back.

A parcel is read and written a range of its flat elements at a time, so that an exchange can go in chunks. The mean it
is given is exactly the mean of what the replicas sent, which coding makes a little different from what they had; what
it is told it *lost* is that difference for this replica. Kept and sent another time, nothing is ever lost, only late
(error feedback: Seide et al., 2014; Karimireddy et al., 2019, arXiv:1901.09847).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import quantization
from .drift import DriftMeter


class Parcel:
    """One tensor of an exchange.

    Args:
        name: What to call the tensor in an error.
        numel: Its number of elements.
        wire_format: How it is coded.
    """

    def __init__(self, name: str, numel: int, wire_format: str) -> None:
        self.name = name
        self.numel = numel
        self.wire_format = wire_format

    def read(self, start: int, stop: int) -> Tensor:
        """The elements to send, flat."""
        raise NotImplementedError

    def write(self, start: int, stop: int, mean: Tensor, lost: Tensor | None) -> None:
        """Take the mean over the replicas, and what this replica meant to send and did not (``None`` for nothing)."""
        raise NotImplementedError

    def finish(self) -> None:
        """All elements are written."""


class Averaged(Parcel):
    """A tensor that becomes the mean, in place; what coding loses of it is gone."""

    def __init__(
        self, name: str, tensor: Tensor, wire_format: str = "float32", meter: DriftMeter | None = None
    ) -> None:
        super().__init__(name, tensor.numel(), full_width(tensor) if wire_format == "float32" else wire_format)
        self._meter = meter
        self._tensor = tensor.detach()
        self._flat = self._tensor.reshape(-1)

    def read(self, start: int, stop: int) -> Tensor:  # noqa: D102
        return self._flat[start:stop]

    def write(self, start: int, stop: int, mean: Tensor, lost: Tensor | None) -> None:  # noqa: D102
        if self._meter is not None:
            self._meter.observe(self._flat[start:stop], mean)
        self._flat[start:stop].copy_(mean)

    def finish(self) -> None:  # noqa: D102
        if not self._tensor.is_contiguous():
            self._tensor.copy_(self._flat.view(self._tensor.shape))


class Integers(Parcel):
    """An integer or boolean tensor that becomes rank 0's: its bytes travel as small numbers, other ranks' as zeros."""

    def __init__(self, name: str, tensor: Tensor, rank: int, world_size: int) -> None:
        self._tensor = tensor
        self._numbers = quantization.integers_to_numbers(tensor).mul_(world_size if rank == 0 else 0)
        super().__init__(name, self._numbers.numel(), "float32")

    def read(self, start: int, stop: int) -> Tensor:  # noqa: D102
        return self._numbers[start:stop]

    def write(self, start: int, stop: int, mean: Tensor, lost: Tensor | None) -> None:  # noqa: D102
        self._numbers[start:stop].copy_(mean)

    def finish(self) -> None:  # noqa: D102
        self._tensor.copy_(quantization.numbers_to_integers(self._numbers, like=self._tensor))


class Factor(Parcel):
    """A stack of factors, shape (k, m, r): ``mean`` is the replicas', and the factor becomes what this replica sent.

    It travels column by column: the columns of a factor differ in length by orders of magnitude, and a block whose
    elements share a step must not mix them.
    """

    def __init__(self, name: str, factor: Tensor, wire_format: str) -> None:
        super().__init__(name, factor.numel(), full_width(factor) if wire_format == "float32" else wire_format)
        self._factor = factor
        self._columns = factor.mT.clone(memory_format=torch.contiguous_format)
        self._flat = self._columns.view(-1)
        self._lost = torch.zeros_like(self._columns) if self.wire_format == wire_format != "float32" else None

    @property
    def mean(self) -> Tensor:
        """The mean of the factors, shape (k, m, r), once the exchange is over."""
        return self._columns.mT

    def read(self, start: int, stop: int) -> Tensor:  # noqa: D102
        return self._flat[start:stop]

    def write(self, start: int, stop: int, mean: Tensor, lost: Tensor | None) -> None:  # noqa: D102
        self._flat[start:stop].copy_(mean)
        if self._lost is not None and lost is not None:
            self._lost.view(-1)[start:stop].copy_(lost)

    def finish(self) -> None:  # noqa: D102
        if self._lost is not None:
            self._factor.sub_(self._lost.mT)


class Displacement(Parcel):
    """What a parameter moved since the last consensus, and what coding kept back of earlier moves.

    Args:
        name: Of the parameter.
        parameter: Afterwards anchor + mean, the same bits on all replicas.
        anchor: Where the replicas last agreed, contiguous; moves by the mean.
        wire_format: How the displacement is coded.
        residual: What was not sent yet, contiguous; becomes what coding lost this time. ``None`` to send the
            displacement alone.
        outer_step: Turns a range of the mean into the move to make.
        meter: Sees where the parameter was and where it goes.
    """

    def __init__(
        self,
        name: str,
        parameter: Tensor,
        anchor: Tensor,
        wire_format: str,
        residual: Tensor | None,
        outer_step: Callable[[Tensor, int, int], Tensor] | None,
        meter: DriftMeter | None = None,
    ) -> None:
        plain = full_width(parameter) if wire_format == "float32" else wire_format
        super().__init__(f"displacement of {name}", parameter.numel(), plain)
        self._parameter = parameter.detach()
        self._flat = self._parameter.reshape(-1)
        self._anchor = anchor.view(-1)
        self._residual = residual.view(-1) if residual is not None else None
        self._outer_step = outer_step
        self._meter = meter

    def read(self, start: int, stop: int) -> Tensor:  # noqa: D102
        # From where the parameter was put, which is the anchor only to the parameter's precision.
        anchor = self._anchor[start:stop]
        displacement = self._flat[start:stop].to(anchor.dtype) - anchor.to(self._flat.dtype).to(anchor.dtype)
        return displacement if self._residual is None else displacement.add_(self._residual[start:stop])

    def write(self, start: int, stop: int, mean: Tensor, lost: Tensor | None) -> None:  # noqa: D102
        if self._residual is not None and lost is not None:
            self._residual[start:stop].copy_(lost)
        move = mean if self._outer_step is None else self._outer_step(mean, start, stop)
        self._anchor[start:stop].add_(move)
        if self._meter is not None:
            self._meter.observe(self._flat[start:stop], self._anchor[start:stop])

    def finish(self) -> None:  # noqa: D102
        self._parameter.copy_(self._anchor.view(self._parameter.shape))


def full_width(tensor: Tensor) -> str:
    """The plain format that loses nothing of a tensor."""
    return "float64" if tensor.dtype == torch.float64 else "float32"
