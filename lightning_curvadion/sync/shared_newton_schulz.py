"""Newton-Schulz of a replica's matrices, shared out: each of its processes takes some, and tells the others."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..optim import muon
from ..optim.matrix_stacks import STACK_ELEMENTS
from .rotation import balanced_parts
from .two_levels import InnerProcesses


class SharedNewtonSchulz:
    """The processes of one replica, as :class:`~lightning_curvadion.optim.shared_work.SharedWork`.

    Args:
        inner: They have joined.
    """

    def __init__(self, inner: InnerProcesses) -> None:
        self._inner = inner
        self.elements = inner.size * STACK_ELEMENTS

    def newton_schulz(self, momenta: Sequence[Tensor], eps: Sequence[float]) -> list[Tensor]:
        """Orthonormalise matrices: those of a process travel in one all-gather, filled up to the longest share."""
        # By stack and place in it; an iteration multiplies by the smaller side.
        matrices = [(number, row) for number, own in enumerate(momenta) for row in range(len(own))]
        costs = [momenta[number][row].numel() * min(momenta[number].shape[1:]) for number, row in matrices]
        owned = [[matrices[place] for place in part] for part in balanced_parts(costs, self._inner.size)]
        lengths = [sum(momenta[number][row].numel() for number, row in own) for own in owned]
        mine = owned[self._inner.rank]
        dtype = momenta[0].dtype
        for own in momenta:
            dtype = torch.promote_types(dtype, own.dtype)
        flat = momenta[0].new_zeros(max(lengths), dtype=dtype)
        start = 0
        for number in dict.fromkeys(number for number, _ in mine):
            rows = [row for other, row in mine if other == number]
            update = muon.newton_schulz(momenta[number][rows], eps[number]).reshape(-1)
            flat[start : start + update.numel()] = update
            start += update.numel()
        updates = [torch.empty_like(own, memory_format=torch.contiguous_format) for own in momenta]
        for part_of, length, gathered in zip(owned, lengths, self._inner.collectives.all_gather(flat), strict=True):
            targets = [updates[number][row] for number, row in part_of]
            parts = gathered[:length].split([target.numel() for target in targets])
            for target, part in zip(targets, parts, strict=True):
                target.copy_(part.view(target.shape))
        return updates
