"""Whole matrices of shards: the processes of a replica share out what needs all rows of a matrix.

Each matrix has an owner. All processes send it their rows in one all-to-all, it computes, and a second all-to-all gives
back to each its rows. So no process holds all matrices, and each computes for its share of them, as in microsoft/dion.
"""

import math
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from ..optim.matrix_stacks import STACK_ELEMENTS
from ..optim.shards import Shard, WholeComputation, rows_of
from ..optim.shared_work import runs
from .collectives import bytes_of
from .rotation import balanced_parts
from .two_levels import InnerProcesses


class _Task(NamedTuple):
    """One parameter of a computation."""

    computation: WholeComputation
    position: int

    @property
    def inputs(self) -> list[Shard]:
        return [shards[self.position] for shards in self.computation.inputs]

    @property
    def outputs(self) -> list[Shard]:
        return [shards[self.position] for shards in self.computation.outputs]

    @property
    def numel(self) -> int:
        return math.prod(self.inputs[0].shape)


class InnerShards:
    """The processes of one replica, as :class:`~lightning_curvadion.optim.shards.Shards`.

    Args:
        inner: They have joined.
    """

    def __init__(self, inner: InnerProcesses) -> None:
        self._inner = inner

    def sum_(self, numbers: Tensor) -> None:
        """Replace numbers by their sums over the processes."""
        self._inner.collectives.start_all_reduce_sum(numbers).wait()

    def compute(self, computations: Sequence[WholeComputation]) -> None:
        """Run computations. Whole tensors exist for some of them at a time: a stack of matrices for each process."""
        tasks = [_Task(own, position) for own in computations for position in range(len(own.inputs[0]))]
        for some in runs(tasks, [task.numel for task in tasks], self._inner.size * STACK_ELEMENTS):
            self._compute(some)

    def _compute(self, tasks: Sequence[_Task]) -> None:
        owned = balanced_parts([task.numel for task in tasks], self._inner.size)
        tasks_of = [[tasks[number] for number in numbers] for numbers in owned]
        mine = tasks_of[self._inner.rank]
        processes = range(self._inner.size)
        received = self._all_to_all(
            outgoing=[[shard.local for task in own for shard in task.inputs] for own in tasks_of],
            incoming=[
                [self._rows_of(shard, process) for task in mine for shard in task.inputs] for process in processes
            ],
        )
        wholes = iter([torch.cat(rows) for rows in zip(*received, strict=True)])
        outputs = _run(mine, [[next(wholes) for _ in task.inputs] for task in mine])
        returned = self._all_to_all(
            outgoing=[
                [whole[slice(*rows_of(len(whole), p, self._inner.size))] for whole in outputs] for p in processes
            ],
            incoming=[[shard.local for task in own for shard in task.outputs] for own in tasks_of],
        )
        for own, rows_of_owner in zip(tasks_of, returned, strict=True):
            for shard, rows in zip((shard for task in own for shard in task.outputs), rows_of_owner, strict=True):
                shard.local.copy_(rows)

    def _rows_of(self, shard: Shard, process: int) -> Tensor:
        """A tensor shaped like the rows that another process holds, without memory of its own."""
        start, stop = rows_of(shard.shape[0], process, self._inner.size)
        return shard.local.new_empty(()).expand(stop - start, *shard.shape[1:])

    def _all_to_all(
        self, outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[Sequence[Tensor]]
    ) -> list[list[Tensor]]:
        """Send tensors to each process, and receive those of it.

        Args:
            outgoing: For each process.
            incoming: Shaped like what each process sends, for dtypes and shapes.
        """
        collectives = self._inner.collectives
        sent = [[bytes_of(tensor) for tensor in own] for own in outgoing]
        expected = [[tensor.numel() * tensor.itemsize for tensor in own] for own in incoming]
        flat = collectives.all_to_all_of_bytes(
            torch.cat([torch.empty(0, dtype=torch.uint8, device=collectives.device), *chain.from_iterable(sent)]),
            [sum(part.numel() for part in own) for own in sent],
            [sum(own) for own in expected],
        )
        parts = iter(flat.split([size for own in expected for size in own]))
        # Copied, since numbers must start at a multiple of their size.
        return [[next(parts).clone().view(like.dtype).view(like.shape) for like in own] for own in incoming]


def _run(tasks: Sequence[_Task], inputs: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The outputs of tasks, of those of one computation at once, given the whole inputs of each."""
    by_computation: dict[int, list[int]] = {}
    for number, task in enumerate(tasks):
        by_computation.setdefault(id(task.computation), []).append(number)
    outputs: dict[int, list[Tensor]] = {}
    for numbers in by_computation.values():
        computed = tasks[numbers[0]].computation.function(
            [list(own) for own in zip(*(inputs[number] for number in numbers), strict=True)]
        )
        outputs.update(zip(numbers, map(list, zip(*computed, strict=True)), strict=True))
    return [output for number in range(len(tasks)) for output in outputs[number]]
