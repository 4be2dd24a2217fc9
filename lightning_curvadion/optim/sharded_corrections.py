"""Momentum correction of sharded matrices, all at once, so that the processes that hold them share the work."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .matrix_layout import as_matrices, as_parameter, matrix_shape
from .momentum_correction import change_of_momentum
from .parameter_groups import Group
from .rmmc import norm_ratios
from .shards import Shard, Shards, WholeComputation, norms_of_shard, shard_of, whole_norms


class _Correction(NamedTuple):
    """What :func:`~lightning_curvadion.optim.momentum_correction.correct_momentum_` takes, of one parameter's rows."""

    group: Group
    state: dict[str, Any]
    difference: Tensor
    travel: float
    share: float

    def change(self, inputs: list[list[Tensor]]) -> list[list[Tensor]]:
        """The change of the whole momentum, of the parameter's shape."""
        ((momentum,), (difference,)) = inputs
        M, own = as_matrices(momentum, self.group), as_matrices(difference, self.group)
        change = change_of_momentum(self.group, self.state, M, own, self.travel, self.share)
        rows_and_columns = matrix_shape(momentum.shape, self.group)
        return [[as_parameter(change.reshape(-1, *rows_and_columns), momentum.shape, self.group)]]


class ShardedCorrections:
    """The corrections of one mean. They take place once the last of the differences is known.

    Args:
        shards: The processes that hold the parameters.
    """

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._expected = 0
        self._known: list[_Correction] = []

    def expect(self, group: Group, state: dict[str, Any], travel: float, share: float) -> Callable[[Tensor], None]:
        """What receives the difference of one parameter's rows; the other arguments are ``correct_momentum_``'s."""
        self._expected += 1
        return partial(self._add, group, state, travel, share)

    def _add(self, group: Group, state: dict[str, Any], travel: float, share: float, difference: Tensor) -> None:
        # The caller goes on to overwrite it.
        self._known.append(_Correction(group, state, difference.clone(), travel, share))
        if len(self._known) == self._expected:
            _correct_(self._known, self._shards)


def _correct_(corrections: Sequence[_Correction], shards: Shards) -> None:
    momenta = [shard_of(own.state["momentum"]) for own in corrections]
    changes = [
        Shard(torch.empty_like(local, dtype=torch.promote_types(local.dtype, torch.float32)), shape)
        for local, shape in momenta
    ]
    before = _norms(corrections, shards)
    shards.compute(
        [
            WholeComputation(own.change, [[momentum], [Shard(own.difference, momentum.shape)]], [[change]])
            for own, momentum, change in zip(corrections, momenta, changes, strict=True)
        ]
    )
    for momentum, change in zip(momenta, changes, strict=True):
        momentum.local.sub_(change.local)
    # As in momentum_correction.py.
    for own, earlier, later in zip(corrections, before, _norms(corrections, shards), strict=True):
        own.state["norm"].mul_(norm_ratios(later, earlier).view(own.state["norm"].shape))


def _norms(corrections: Sequence[_Correction], shards: Shards) -> list[Tensor]:
    """The norms of the momenta, for each parameter."""
    return whole_norms(shards, [norms_of_shard(own.state["momentum"], own.group) for own in corrections])
