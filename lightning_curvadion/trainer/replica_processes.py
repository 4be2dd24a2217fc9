"""Replicas of several processes: which ranks they are, their process groups, and what trains inside of them."""

import inspect
from datetime import timedelta
from typing import Literal

import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

ReplicaSize = int | Literal["node"]
# What the strategy decides itself, or what would change what a replica sends.
_NOT_FOR_USERS = {"module", "device_ids", "output_device", "dim", "process_group", "device_mesh", "mixed_precision"}
DDP_ARGUMENTS = set(inspect.signature(DistributedDataParallel).parameters) - _NOT_FOR_USERS


def check_replica_size(replica_size: ReplicaSize) -> None:
    """Check the argument of the strategy.

    Raises:
        MisconfigurationException: It is no number of processes.
    """
    if replica_size != "node" and (isinstance(replica_size, bool) or not isinstance(replica_size, int)):
        raise MisconfigurationException(f'replica_size must be a number of processes or "node", not {replica_size!r}')
    if replica_size != "node" and replica_size < 1:
        raise MisconfigurationException(f"replica_size must be at least 1 process, not {replica_size}")


def processes_per_replica(replica_size: ReplicaSize, devices: int, world_size: int) -> int:
    """Number of consecutive processes that form a replica.

    Args:
        replica_size: The argument of the strategy.
        devices: Processes on each node.
        world_size: Processes in all.

    Raises:
        MisconfigurationException: They do not divide evenly, or a replica would have parts of nodes.

    Example:
        >>> processes_per_replica("node", devices=8, world_size=32), processes_per_replica(2, devices=4, world_size=4)
        (8, 2)
    """
    size = devices if replica_size == "node" else replica_size
    if world_size % size:
        raise MisconfigurationException(
            f"{world_size} processes are no whole number of replicas of replica_size={replica_size!r}, which is {size}"
            f" processes: choose one of {', '.join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)}"
        )
    return size


def make_replica_groups(size: int, timeout: timedelta | None) -> tuple[ProcessGroup, ProcessGroup]:
    """Make the process groups of replicas of consecutive ranks; every rank calls it.

    Args:
        size: Processes of a replica.
        timeout: Of their collectives; ``None`` for the backend's own.

    Returns:
        Those of this process: its counterparts in the other replicas, and its own replica.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    first = rank // size * size
    members = (range(rank % size, world_size, size), range(first, first + size))
    counterparts, replica = (
        dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True) for ranks in members
    )
    return counterparts, replica


def synchronize_batch_norm_inside(module: nn.Module, inner_group: ProcessGroup) -> None:
    """Let synchronised batch norms, as ``sync_batchnorm`` makes them, share their statistics inside a replica."""
    for part in module.modules():
        if isinstance(part, nn.SyncBatchNorm) and part.process_group is None:
            part.process_group = inner_group
