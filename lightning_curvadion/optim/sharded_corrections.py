"""Momentum correction of sharded matrices, all at once, so that the processes that hold them share the work."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import muon
from .matrix_layout import as_matrices
from .matrix_stacks import State, batches
from .momentum_correction import Correction, differences_of_steps, subtract_changes_
from .parameter_groups import Group
from .rmmc import norm_ratios
from .shards import Shard, Shards, WholeComputation, norms_of_shard, shard_of, whole_norms


def correct_sharded_momenta_(
    group: Group,
    states: Mapping[Tensor, State],
    corrections: Mapping[Tensor, Correction],
    polars: Mapping[Tensor, Tensor],
    shards: Shards,
) -> None:
    """As :func:`~lightning_curvadion.optim.momentum_correction.correct_momenta_`, of a group of sharded matrices.

    Args:
        group: Of the parameters.
        states: Their state, by parameter.
        corrections: By parameter; of some of them, and of the rows that this process holds.
        polars: Rows of the orthonormalised momentum, by parameter. Of those that are missing it is computed.
        shards: The processes that hold the parameters.
    """
    moved = [parameter for parameter, correction in corrections.items() if correction.travel]
    if not moved:
        return

    def norms() -> Sequence[Tensor]:
        return whole_norms(shards, [norms_of_shard(states[p]["momentum"], group) for p in moved])

    before = norms()
    shards.compute(
        [_correction_of(group, batch, states, corrections, polars) for batch in batches(group, moved, states)]
    )
    for parameter, earlier, later in zip(moved, before, norms(), strict=True):
        norm = states[parameter]["norm"]
        norm.mul_(norm_ratios(later, earlier).view(norm.shape))


def _correction_of(
    group: Group,
    parameters: Sequence[Tensor],
    states: Mapping[Tensor, State],
    corrections: Mapping[Tensor, Correction],
    polars: Mapping[Tensor, Tensor],
) -> WholeComputation:
    """The computation that corrects the momenta of parameters of one shape."""

    def correct(inputs: list[list[Tensor]]) -> list[list[Tensor]]:
        momenta, differences, *polars = inputs
        root = None
        if polars:
            pairs = zip(polars[0], momenta, strict=True)
            root = torch.stack([muon.root_of_polar(*(as_matrices(one, group) for one in pair)) for pair in pairs])
        subtract_changes_(group, momenta, differences, root)
        return [momenta]

    momenta = [shard_of(states[parameter]["momentum"]) for parameter in parameters]
    differences = differences_of_steps(group, states[parameters[0]], [corrections[p] for p in parameters])
    rows = [differences]
    if all(parameter in polars for parameter in parameters):
        rows.append([polars[parameter] for parameter in parameters])
    inputs = [[Shard(own, momentum.shape) for own, momentum in zip(some, momenta, strict=True)] for some in rows]
    return WholeComputation(correct, inputs=[momenta, *inputs], outputs=[momenta])
