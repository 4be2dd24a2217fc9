"""Payloads: what one tensor sends, and what becomes of the mean that comes back.

A payload is read and written by ranges of its flat elements, so that large tensors can travel in chunks. The mean that
arrives is exactly the mean of what the replicas sent. Quantization makes what a replica sends differ from its values;
this difference is the replica's quantization error. Stored and sent with the next payload, it is late but not lost
(error feedback: Seide et al., 2014; Karimireddy et al., 2019, arXiv:1901.09847).
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..optim.shards import is_sharded, local_of
from .anchors import Anchors
from .drift import DriftMeter
from .pace import Weight

# Dtypes of which a mean can be formed.
_AVERAGED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# With fewer rows, nearly all of an embedding are looked up between two sync steps.
FEWEST_ROWS = 1024


class Payload:
    """One tensor of a collective.

    Args:
        name: The tensor's name in errors.
        numel: Number of its elements.
        wire_format: Format of its elements on the wire.

    Attributes:
        needs_own_error: Whether all processes of a replica need its quantization error, and not only those that send.
        of_shard: Whether it is of the rows that this process of a replica holds, and its counterparts in the others.
        origin: The parameter whose anchor moves by the mean, and the anchors; ``None`` where none does.
    """

    needs_own_error = False
    of_shard = False
    origin: tuple[Anchors, Tensor] | None = None

    def __init__(self, name: str, numel: int, wire_format: str) -> None:
        self.name = name
        self.numel = numel
        self.wire_format = wire_format

    @property
    def sources(self) -> Sequence[Tensor]:
        """Tensors whose sum is what :meth:`read` returns, up to signs and rounding: finite, if these are."""
        raise NotImplementedError

    def read(self, start: int, stop: int) -> Tensor:
        """The flat elements from ``start`` to ``stop``, to send."""
        raise NotImplementedError

    def rows_between(self, start: int, stop: int) -> tuple[Tensor | None, tuple[int, int]]:
        """Which rows of the tensor a range of flat elements is of, and the range in these; ``None`` for all rows."""
        return None, (start, stop)

    def share(self, process: int, processes: int) -> tuple[int, int]:
        """Start and end of the flat elements that one process of a replica sends.

        An element of a parameter has the same sender at every sync step, which stores its error-feedback residual.
        """
        return share_of(self.numel, process, processes)

    def write(self, start: int, stop: int, mean: Tensor, error: Tensor | None) -> None:
        """Take over the mean over the replicas.

        Args:
            start: First of the flat elements.
            stop: End of the flat elements.
            mean: Mean of these elements.
            error: Quantization error of this replica: its values less what it sent; ``None`` at full width, and where
                another process of the replica has sent them.
        """
        raise NotImplementedError

    def finish(self) -> None:
        """Called once, after all elements are written."""

    def break_off(self) -> None:
        """Called in place of :meth:`finish` where another rank is lost: no more elements will be written.

        Those that are stay the mean, and the others what they were: a state that can be saved.
        """


class TensorPayload(Payload):
    """A tensor that becomes the mean, in place. Its quantization error is dropped."""

    def __init__(
        self, name: str, tensor: Tensor, wire_format: str = "float32", meter: DriftMeter | None = None
    ) -> None:
        self.of_shard, tensor = is_sharded(tensor), local_of(tensor)
        super().__init__(name, tensor.numel(), full_width(tensor) if wire_format == "float32" else wire_format)
        self._meter = meter
        self._tensor = tensor.detach()
        self._flat = self._tensor.reshape(-1)

    @property
    def sources(self) -> Sequence[Tensor]:  # noqa: D102
        return [self._flat]

    def read(self, start: int, stop: int) -> Tensor:  # noqa: D102
        return self._flat[start:stop]

    def write(self, start: int, stop: int, mean: Tensor, error: Tensor | None) -> None:  # noqa: D102
        if self._meter is not None:
            self._meter.observe(self._flat[start:stop], mean)
        self._flat[start:stop].copy_(mean)

    def finish(self) -> None:  # noqa: D102
        if not self._tensor.is_contiguous():
            self._tensor.copy_(self._flat.view(self._tensor.shape))

    def break_off(self) -> None:  # noqa: D102
        self.finish()


class FactorPayload(Payload):
    """A stack of factors, shape (k, m, r). The factor itself becomes what this replica sent of it.

    It travels column by column. The columns of a factor differ in length by orders of magnitude, and the elements of a
    quantization block share one step, so a block must not mix columns.
    """

    def __init__(self, name: str, factor: Tensor, wire_format: str) -> None:
        super().__init__(name, factor.numel(), full_width(factor) if wire_format == "float32" else wire_format)
        self._factor = factor
        self._columns = factor.mT.clone(memory_format=torch.contiguous_format)
        self._flat = self._columns.view(-1)
        self._error = torch.zeros_like(self._columns) if self.wire_format == wire_format != "float32" else None
        self.needs_own_error = self._error is not None

    @property
    def mean(self) -> Tensor:
        """Mean of the replicas' factors, shape (k, m, r), once :meth:`finish` was called."""
        return self._columns.mT

    @property
    def sources(self) -> Sequence[Tensor]:  # noqa: D102
        return [self._flat]

    def read(self, start: int, stop: int) -> Tensor:  # noqa: D102
        return self._flat[start:stop]

    def write(self, start: int, stop: int, mean: Tensor, error: Tensor | None) -> None:  # noqa: D102
        self._flat[start:stop].copy_(mean)
        if self._error is not None and error is not None:
            self._error.view(-1)[start:stop].copy_(error)

    def finish(self) -> None:  # noqa: D102
        if self._error is not None:
            self._factor.sub_(self._error.mT)


class DisplacementPayload(Payload):
    """What a parameter moved since the last consensus, plus the error-feedback residual of earlier sync steps.

    Args:
        name: The parameter's name.
        parameter: Becomes anchor + mean: the same bits on all replicas.
        anchor: Value at the last consensus, contiguous; moves by the mean.
        wire_format: Format of the displacement on the wire.
        residual: Error-feedback residual, contiguous; becomes the quantization error of this time. ``None`` to send
            the displacement alone.
        outer_step: Turns a range of the mean into the move to make; ``None`` moves by the mean.
        meter: Measures the drift of the parameter.
        correct_momenta: When it is first called, it corrects the momenta of all parameters of the mean by their
            :attr:`difference`. ``None`` to leave the momentum alone.
        first: The flat element that the residual begins with, where this process sends a share alone.
        flushed: Called in the end where the residual is sent at full width, and nothing of it is left.
        weight: What the displacement counts; ``None`` where all replicas count the same.
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
        correct_momenta: Callable[[], None] | None = None,
        first: int = 0,
        flushed: Callable[[], object] | None = None,
        weight: Weight | None = None,
    ) -> None:
        wire_format = full_width(parameter) if wire_format == "float32" else wire_format
        self.of_shard, parameter = is_sharded(parameter), local_of(parameter)
        super().__init__(f"displacement of {name}", parameter.numel(), wire_format)
        self._parameter = parameter.detach()
        self._flat = self._parameter.reshape(-1)
        self._anchor = anchor.view(-1)
        self._residual = residual.view(-1) if residual is not None else None
        self._first = first
        self._flushed = flushed
        self._outer_step = outer_step
        self._meter = meter
        self._correct_momenta = correct_momenta
        self._weight = weight
        self._written: list[tuple[int, int]] = []

    @property
    def difference(self) -> Tensor:
        """The mean displacement less this replica's own, of the parameter's shape: between writing and finishing."""
        return self._flat.view(self._parameter.shape)

    @property
    def sources(self) -> Sequence[Tensor]:  # noqa: D102
        return [self._flat, self._anchor] + ([self._residual] if self._residual is not None else [])

    def read(self, start: int, stop: int) -> Tensor:  # noqa: D102
        displacement = self._displacement(start, stop)
        if self._weight is not None:
            displacement.mul_(self._weight.factor)
        return displacement if self._residual is None else displacement.add_(self._residual[self._owned(start, stop)])

    def _owned(self, start: int, stop: int) -> slice:
        return slice(start - self._first, stop - self._first)

    def share(self, process: int, processes: int) -> tuple[int, int]:  # noqa: D102
        return share_of_parameter(self._parameter, process, processes)

    def _displacement(self, start: int, stop: int) -> Tensor:
        return displacement_of(self._flat[start:stop], self._anchor[start:stop])

    def write(self, start: int, stop: int, mean: Tensor, error: Tensor | None) -> None:  # noqa: D102
        if self._residual is not None and error is not None:
            keep_back(self._residual[self._owned(start, stop)], error, self._weight)
        if self._residual is not None and self._flushed is not None:
            self._residual[self._owned(max(start, self._first), max(stop, self._first))].zero_()
        if self._weight is not None:
            mean = mean * self._weight.correction
        own = self._displacement(start, stop) if self._correct_momenta is not None else None
        move = mean if self._outer_step is None else self._outer_step(mean, start, stop)
        self._anchor[start:stop].add_(move)
        if self._meter is not None:
            self._meter.observe(self._flat[start:stop], self._anchor[start:stop])
        if own is not None:
            # The parameter is free to hold the difference: it becomes the anchor when all of it is written.
            mean = mean if self._weight is None else mean / self._weight.stretch
            torch.sub(mean, own, out=self._flat[start:stop])
        self._written.append((start, stop))

    def finish(self) -> None:  # noqa: D102
        if self._correct_momenta is not None:
            # The first of the mean's payloads does it for all: every difference is written by now.
            self._correct_momenta()
        self._parameter.copy_(self._anchor.view(self._parameter.shape))
        if self._flushed is not None:
            self._flushed()

    def break_off(self) -> None:  # noqa: D102
        for start, stop in self._written:
            self._flat[start:stop].copy_(self._anchor[start:stop])
        self._parameter.copy_(self._flat.view(self._parameter.shape))


def keep_back(residual: Tensor, error: Tensor, weight: Weight | None) -> None:
    """Let a residual become what quantization has left, in place; see ``pace.py`` for the weight."""
    if weight is None:
        residual.copy_(error)
    else:
        residual.mul_(1.0 - weight.correction).add_(error, alpha=weight.correction)


def share_of(count: int, process: int, processes: int) -> tuple[int, int]:
    """Start and end of the part of some elements that falls to one of several processes.

    Example:
        >>> share_of(5, 0, 2), share_of(5, 1, 2)
        ((0, 2), (2, 5))
    """
    return count * process // processes, count * (process + 1) // processes


def share_of_parameter(parameter: Tensor, process: int, processes: int) -> tuple[int, int]:
    """Start and end of the flat elements of a whole parameter that one process of a replica sends."""
    if not has_sparse_rows(parameter):
        return share_of(parameter.numel(), process, processes)
    # Whole rows, as where only those travel that have moved: they share a residual.
    rows, columns = parameter.shape
    start, stop = share_of(rows, process, processes)
    return start * columns, stop * columns


def has_sparse_rows(parameter: Tensor) -> bool:
    """Whether few rows of a parameter may move between two sync steps, judged by its shape alone."""
    return parameter.dim() == 2 and parameter.shape[0] >= FEWEST_ROWS


def displacement_of(own: Tensor, anchor: Tensor) -> Tensor:
    """How far values moved from their anchor: a new tensor of the anchor's dtype."""
    # A narrow parameter started from the rounded anchor, not from the anchor.
    return own.to(anchor.dtype) - anchor.to(own.dtype).to(anchor.dtype)


def full_width(tensor: Tensor) -> str:
    """The format that sends a tensor without rounding it."""
    return "float64" if tensor.dtype == torch.float64 else "float32"


def is_averaged(tensor: Tensor) -> bool:
    """Whether a mean of tensors of this dtype means anything."""
    return tensor.is_complex() or tensor.dtype in _AVERAGED


def full_width_payloads(tensors: Mapping[str, Tensor]) -> tuple[list[Payload], list[Tensor]]:
    """Payloads of the tensors that become their exact mean, and the tensors that become rank 0's.

    The latter are integers, booleans and codes such as float8: a mean of codes means nothing. A complex number is
    averaged as two real ones.
    """
    payloads: list[Payload] = []
    others: list[Tensor] = []
    for name, tensor in tensors.items():
        if is_averaged(tensor):
            real = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor
            payloads.append(TensorPayload(name, real))
        else:
            others.append(tensor)
    return payloads, others
