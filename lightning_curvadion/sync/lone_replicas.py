"""A warning for processes that train apart: several ranks whose optimizer has no sync hook."""

import warnings
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch.distributed as dist

from ..optim.curvadion import CurvaDion

# Collectives of the default group so far, at each optimizer's last step; ``None`` once it has warned.
_collectives_before: WeakKeyDictionary[CurvaDion, int | None] = WeakKeyDictionary()


def warn_if_apart(optimizer: CurvaDion) -> None:
    """Warn once where the default process group has several ranks and sent nothing between two steps.

    Called at the steps of an optimizer without a hook. Under ``DistributedDataParallel``, which averages gradients
    between the steps, such an optimizer is right.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    collectives: int | None = cast(Any, dist.group.WORLD)._get_sequence_number_for_group()
    before = _collectives_before.get(optimizer, -1)
    if before == collectives:
        if dist.get_rank() == 0:
            warnings.warn(
                f"Call optimizer.register_sync_hook(ProcessGroupSync()) on every rank: CurvaDion has no hook, and the"
                f" {dist.get_world_size()} processes sent nothing between two of its steps, so that each trains a model"
                " of its own.",
                stacklevel=5,
            )
        collectives = None
    if before is not None:
        _collectives_before[optimizer] = collectives
