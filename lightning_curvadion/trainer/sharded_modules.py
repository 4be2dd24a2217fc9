"""Modules that ``configure_model`` has sharded over the processes of a replica, with torch's ``fully_shard``."""

from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.distributed import ProcessGroup, get_process_group_ranks, new_group

from ..optim.shards import is_sharded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# As under Lightning's ModelParallelStrategy, so that one configure_model serves both.
_DIMENSIONS = ("data_parallel", "tensor_parallel")


def may_be_sharded(module: "pl.LightningModule | None") -> bool:
    """Whether a module has the hook in which it could be sharded."""
    return module is not None and is_overridden("configure_model", module)


def holds_shards(module: nn.Module | None) -> bool:
    """Whether any parameter of a module is sharded."""
    return module is not None and any(is_sharded(parameter) for parameter in module.parameters())


def mesh_of_replica(inner_group: ProcessGroup, device: torch.device) -> "DeviceMesh":
    """The device mesh over which ``configure_model`` shards; every process of the replica calls it.

    Args:
        inner_group: The processes of the replica.
        device: Of this process.

    Returns:
        Shape (processes, 1), with the dimensions ``"data_parallel"`` and ``"tensor_parallel"``.
    """
    # Seconds to import.
    from torch.distributed.device_mesh import DeviceMesh

    ranks = get_process_group_ranks(inner_group)
    alone = new_group([torch.distributed.get_rank()], use_local_synchronization=True)
    return DeviceMesh.from_group(
        [inner_group, alone], device.type, mesh=[[rank] for rank in ranks], mesh_dim_names=_DIMENSIONS
    )


def check_shards(module: nn.Module, mesh: "DeviceMesh | None") -> None:
    """Check that a module is sharded over the processes of its replica, and not otherwise.

    Args:
        module: Of one process.
        mesh: Of its replica; ``None`` where that is one process.

    Raises:
        MisconfigurationException: A parameter is sharded over other processes, or by tensor parallelism.
    """
    for name, parameter in module.named_parameters():
        if not is_sharded(parameter):
            continue
        if mesh is None:
            raise MisconfigurationException(
                f"give CurvaDionStrategy(replica_size=...) the number of processes that share a model, or 'node':"
                f" {name} is sharded, but a replica is one process"
            )
        layout = cast(Any, parameter)
        if layout.device_mesh != mesh["data_parallel"]:
            raise MisconfigurationException(
                f'call fully_shard(..., mesh=self.device_mesh["data_parallel"]), and leave out tensor parallelism:'
                f" {name} is sharded over ranks {layout.device_mesh.mesh.flatten().tolist()} as"
                f" {', '.join(map(str, layout.placements))}, but its replica consists of ranks"
                f" {mesh.mesh.flatten().tolist()}, of which each is to hold some rows"
            )
