"""Sparse rows: of a large embedding, only the rows travel that have moved.

A batch looks up few rows of a large vocabulary. Quantized, the displacement of a row at rest would cost as many bytes
as any other. So the replicas first tell each other which rows have moved, in one bit a row, and a row travels where it
has moved on any of them.

AdamW moves a row long after its last lookup, less at every step, and weight decay moves all of them. A row therefore
counts as moved where its displacement, with the error-feedback residual, is no longer small beside that of the farthest
row. What the others moved goes into their residuals. It travels once it has added up: late, but not lost.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..optim.matrix_stacks import STACK_ELEMENTS
from ..optim.shards import is_sharded, local_of
from .drift import DriftMeter
from .pace import Weight
from .payloads import Payload, displacement_of, keep_back, share_of

# A row has moved from this share of the farthest row's displacement on, chosen by loss and bytes
# (examples/benchmarks/vocabulary.py).
SHARE_OF_FARTHEST = 0.03


def row_distances(parameter: Tensor, anchor: Tensor, residual: Tensor, first: int = 0) -> Tensor:
    """How far each row has moved on this replica, with what is left to send: shape (rows,).

    Args:
        parameter: Shape (rows, columns).
        anchor: Its value at the last consensus.
        residual: Its error-feedback residual.
        first: The row that the residual begins with, where this process sends a share alone. The distance of any other
            row is 0.
    """
    stop = first + len(residual)
    parts = map(_in_parts, (parameter.detach()[first:stop], anchor[first:stop], residual))
    distances = [
        torch.linalg.vector_norm(displacement_of(own, start).add_(left), dim=1)
        for own, start, left in zip(*parts, strict=True)
    ]
    return torch.nn.functional.pad(torch.cat(distances), (first, len(parameter) - stop))


def far_rows(distances: Tensor, farthest: Tensor | None = None) -> Tensor:
    """Which rows have moved, given how far: bool. A row with NaN has.

    Args:
        distances: Shape (rows,).
        farthest: The largest distance, where it is of a row that another process holds.

    Example:
        >>> far_rows(torch.tensor([3.0, 0.0, 0.01]))
        tensor([ True, False, False])
    """
    # A comparison with NaN is false, so that what diverged is sent, and refused by name.
    farthest = distances.max() if farthest is None else farthest
    return (distances < SHARE_OF_FARTHEST * farthest).logical_not_() & (distances != 0)


class SparseRowsPayload(Payload):
    """The displacement of some rows of a parameter, plus the error-feedback residual of earlier sync steps.

    Args:
        name: The parameter's name.
        parameter: Shape (rows, columns); becomes the anchor: the same bits on all replicas.
        anchor: Value at the last consensus; its rows that travel move by the mean.
        residual: Error-feedback residual. It becomes the quantization error of the rows that travel, and takes up the
            displacement of the others.
        rows: Indices of the rows that travel, the same on all replicas.
        wire_format: A quantized format.
        meter: Measures the drift of the rows that travel.
        first: The row that the residual begins with, where this process sends a share alone.
        weight: What the displacement counts; ``None`` where all replicas count the same.
    """

    def __init__(
        self,
        name: str,
        parameter: Tensor,
        anchor: Tensor,
        residual: Tensor,
        rows: Tensor,
        wire_format: str,
        meter: DriftMeter | None = None,
        first: int = 0,
        weight: Weight | None = None,
    ) -> None:
        self.of_shard, parameter = is_sharded(parameter), local_of(parameter)
        super().__init__(f"displacement of {name}", rows.numel() * parameter.shape[1], wire_format)
        self._rows, self._columns = rows, parameter.shape[1]
        self._parameter, self._anchor, self._residual = parameter.detach(), anchor, residual
        self._meter, self._first = meter, first
        self._weight = weight

    @property
    def sources(self) -> Sequence[Tensor]:  # noqa: D102
        return [self._parameter, self._anchor, self._residual]

    def read(self, start: int, stop: int) -> Tensor:  # noqa: D102
        rows, part = self._part(start, stop)
        displacement = displacement_of(self._parameter[rows], self._anchor[rows])
        if self._weight is not None:
            displacement.mul_(self._weight.factor)
        displacement.add_(self._residual[rows - self._first])
        return displacement.view(-1)[part]

    def rows_between(self, start: int, stop: int) -> tuple[Tensor, tuple[int, int]]:  # noqa: D102
        rows, part = self._part(start, stop)
        return rows, (part.start, part.stop)

    def share(self, process: int, processes: int) -> tuple[int, int]:  # noqa: D102
        bounds = torch.tensor(share_of(self._parameter.shape[0], process, processes), device=self._rows.device)
        start, stop = torch.searchsorted(self._rows, bounds).tolist()
        return start * self._columns, stop * self._columns

    def write(self, start: int, stop: int, mean: Tensor, error: Tensor | None) -> None:  # noqa: D102
        rows, part = self._part(start, stop)
        own, anchor = self._parameter[rows], self._anchor[rows]
        anchor.view(-1)[part].add_(mean if self._weight is None else mean * self._weight.correction)
        if error is not None:
            residual = self._residual[rows - self._first]
            keep_back(residual.view(-1)[part], error, self._weight)
            self._residual[rows - self._first] = residual
        if self._meter is not None:
            self._meter.observe(own.view(-1)[part], anchor.view(-1)[part])
        own.view(-1)[part].copy_(anchor.view(-1)[part])
        self._parameter[rows], self._anchor[rows] = own, anchor

    def finish(self) -> None:  # noqa: D102
        # The rows that travelled are where their anchors are, and add nothing.
        rows = slice(self._first, self._first + len(self._residual))
        for own, anchor, residual in zip(
            *map(_in_parts, (self._parameter[rows], self._anchor[rows], self._residual)), strict=True
        ):
            left = 1.0 if self._weight is None else self._weight.factor * self._weight.correction
            residual.add_(displacement_of(own, anchor), alpha=left)
        self._parameter.copy_(self._anchor)

    def _part(self, start: int, stop: int) -> tuple[Tensor, slice]:
        """The rows that elements from ``start`` to ``stop`` lie in, and where in these rows they lie."""
        first = start // self._columns
        rows = self._rows[first : -(-stop // self._columns)]
        return rows, slice(start - first * self._columns, stop - first * self._columns)


def _in_parts(tensor: Tensor) -> Sequence[Tensor]:
    """Some rows at a time, as views, so that temporaries stay small beside a large embedding."""
    return tensor.split(max(1, STACK_ELEMENTS // max(1, tensor.shape[1])))
