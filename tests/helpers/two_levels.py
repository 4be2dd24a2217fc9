"""Replicas of several processes, in a process group of the pool."""

import torch.distributed as dist
from models import EXACT
from torch.nn.parallel import DistributedDataParallel

from lightning_curvadion import CurvaDion, ProcessGroupSync, split_parameters


def groups_of(rank, world, size):
    """This process's counterparts in the other replicas, and the processes of its own replica."""
    parts = [list(range(first, world, size)) for first in range(size)]
    parts += [list(range(first, first + size)) for first in range(0, world, size)]
    groups = [dist.new_group(ranks) for ranks in parts]
    outer, inner = (group for group, ranks in zip(groups, parts, strict=True) if rank in ranks)
    return outer, inner


def attach(rank, world, size, model, hook=None, **options):
    """The model in DistributedDataParallel, and its optimizer with a hook of two levels over EXACT."""
    group, inner_group = groups_of(rank, world, size)
    optimizer = CurvaDion(split_parameters(model), lr=0.02, **options)
    sync = ProcessGroupSync(**{**EXACT, **(hook or {})}, group=group, inner_group=inner_group)
    optimizer.register_sync_hook(sync)
    module = DistributedDataParallel(model, process_group=inner_group)
    sync.include_module(module)
    return module, optimizer
