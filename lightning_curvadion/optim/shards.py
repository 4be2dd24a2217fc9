"""Shards: parameters of which each process of a replica holds some rows, as torch's ``fully_shard`` leaves them.

Such a parameter is a DTensor, cut along its first dimension, and so is its state. Steps of single numbers take place on
the local rows. Newton-Schulz and the factors of Dion need whole matrices: a process of the replica receives all rows of
a matrix, computes for all, and gives back to each its rows. Nothing here communicates; ``sync/inner_shards.py`` does.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from .matrix_layout import batch_shape, list_matrices
from .parameter_groups import Group
from .rmmc import tensor_norms


class Shard(NamedTuple):
    """The rows of a tensor that this process holds, and the shape of the whole."""

    local: Tensor
    shape: Sequence[int]


@dataclass(frozen=True)
class WholeComputation:
    """A function of whole tensors, for some parameters of one shape.

    Attributes:
        function: Maps lists of whole tensors, one list for each input, to one list for each output. It is called with
            as many of the parameters as fall to this process.
        inputs: Shards for each parameter.
        outputs: Shards for each parameter, to write to; they may be those of the inputs.
    """

    function: Callable[[list[list[Tensor]]], list[list[Tensor]]]
    inputs: list[list[Shard]]
    outputs: list[list[Shard]]


class Shards(Protocol):
    """What the optimizer asks of the processes of a replica. Every method is a collective among them."""

    def sum_(self, numbers: Tensor) -> None:
        """Replace numbers by their sums over the processes."""

    def compute(self, computations: Sequence[WholeComputation]) -> None:
        """Run computations, shared out over the processes."""


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this room knows no more."""
    return hasattr(tensor, "placements")


def local_of(tensor: Tensor) -> Tensor:
    """The rows that this process holds; the tensor itself where it is whole."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return cast(Tensor, cast(Any, tensor).to_local())


def shard_of(tensor: Tensor) -> Shard:
    """The rows of a sharded tensor that this process holds."""
    return Shard(local_of(tensor), tensor.shape)


def sharded_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """A tensor sharded as a parameter is; the tensor itself where that is whole."""
    if not is_sharded(parameter) or is_sharded(whole):
        return whole
    layout = cast(Any, parameter.detach())
    (process,), processes = layout.device_mesh.get_coordinate(), layout.device_mesh.size()
    start, stop = rows_of(len(whole), process, processes)
    whole = whole.clone(memory_format=torch.contiguous_format)
    return cast(
        Tensor,
        layout.from_local(
            whole[start:stop].clone(memory_format=torch.contiguous_format),
            layout.device_mesh,
            layout.placements,
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        ),
    )


def rows_of(count: int, process: int, processes: int) -> tuple[int, int]:
    """Start and end of the rows of one process: as many for each but the last ones, as ``torch.chunk`` cuts.

    Example:
        >>> [rows_of(5, process, 4) for process in range(4)]
        [(0, 2), (2, 4), (4, 5), (5, 5)]
    """
    most = -(-count // processes)
    return min(count, process * most), min(count, (process + 1) * most)


def own_rows(tensor: Tensor) -> tuple[int, int]:
    """Start and end of the rows of a sharded tensor that this process holds."""
    mesh = cast(Any, tensor).device_mesh
    (process,) = mesh.get_coordinate()
    return rows_of(len(tensor), process, mesh.size())


def matrix_pieces(tensor: Tensor, group: Group) -> tuple[int, list[Tensor]]:
    """What this process holds of the matrices of a sharded tensor, as views, and the number of the first of them.

    Args:
        tensor: Of a parameter's shape.
        group: Of the parameter.
    """
    (start, stop), shape, local, blocks = own_rows(tensor), tensor.shape, local_of(tensor), group["packed"]
    if start == stop:
        return 0, []
    if blocks > 1 and not group["transposed"] and (len(shape) == 2 or group["flatten"]):
        # Blocks of rows, of which some are cut.
        size = shape[0] // blocks
        cuts = [start, *(bound for bound in range(0, shape[0], size) if start < bound < stop), stop]
        return start // size, list(local.split([after - before for before, after in pairwise(cuts)]))
    matrices = list_matrices(local, group)
    # Those of a batch are whole; otherwise each process has rows of all.
    is_batch = len(shape) > 2 and not group["flatten"]
    return start * (len(matrices) // (stop - start)) if is_batch else 0, matrices


def whole_norms(shards: Shards, norms: Sequence[Tensor]) -> list[Tensor]:
    """Norms of whole tensors, given those of what this process holds: the same on all processes."""
    squares = torch.cat(list(norms)).double().square()
    shards.sum_(squares)
    return list(squares.sqrt().float().split([own.numel() for own in norms]))


def norms_by_matrix(norms: Tensor, first: int, count: int) -> Tensor:
    """Norms of pieces as those of all matrices of a parameter: zero where this process holds nothing."""
    return torch.nn.functional.pad(norms, (first, count - first - norms.numel()))


def norms_of_shard(tensor: Tensor, group: Group) -> Tensor:
    """What this process adds to the norm of each matrix of a sharded tensor, float32, shape (matrices,)."""
    first, pieces = matrix_pieces(tensor, group)
    norms = tensor_norms(pieces) if pieces else torch.zeros(0, device=local_of(tensor).device)
    return norms_by_matrix(norms, first, math.prod(batch_shape(tensor.shape, group)))


def matrix_norms(tensor: Tensor, group: Group, shards: Shards | None) -> Tensor:
    """The norm of each matrix of a tensor of a parameter's shape, float32, shape (matrices,).

    Args:
        tensor: Whole, or sharded.
        group: Of the parameter.
        shards: The processes that hold it; ``None`` where it is whole.
    """
    if shards is None:
        return tensor_norms(list_matrices(tensor, group))
    (whole,) = whole_norms(shards, [norms_of_shard(tensor, group)])
    return whole
