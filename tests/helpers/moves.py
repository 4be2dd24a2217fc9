"""What a replica's own steps have moved its parameters, whatever means do to them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_curvadion.optim import local_step


class Moves:
    """Sums of moves. Call ``start`` before every step.

    Args:
        parameters: Of one optimizer.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self.totals = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in parameters]

    def start(self) -> None:
        self._starts = [parameter.detach().clone() for parameter in self.parameters]

    def add(self) -> None:
        for total, parameter, before in zip(self.totals, self.parameters, self._starts, strict=True):
            total += (parameter.detach() - before).double()


@contextmanager
def recorded_moves(parameters: Sequence[Tensor]) -> Iterator[Moves]:
    moves, own_step = Moves(parameters), local_step.step_vector_groups

    # The last part of a replica's own step, before any mean.
    def watched(*args, **kwargs):
        own_step(*args, **kwargs)
        moves.add()

    local_step.step_vector_groups = watched
    try:
        yield moves
    finally:
        local_step.step_vector_groups = own_step


def one_after_another(rank: int, world: int, schedule: Callable[[int, int, int], Any], seeds: Iterable[int]) -> list:
    """What a random schedule of steps gives for each seed, on this replica."""
    ended = []
    own = set(dist.distributed_c10d._world.pg_map)
    for seed in seeds:
        ended.append(schedule(rank, world, seed))
        # Each has groups of its own, of three threads each.
        dist.barrier()
        for group in set(dist.distributed_c10d._world.pg_map) - own:
            dist.destroy_process_group(group)
    return ended
