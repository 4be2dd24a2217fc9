"""Replicas of several processes, in a process group of the pool."""

from models import EXACT
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from lightning_curvadion import CurvaDion, ProcessGroupSync, split_parameters


def groups_of(world, size):
    """This process's counterparts in the other replicas, and the processes of its own replica."""
    mesh = init_device_mesh("cpu", (world // size, size), mesh_dim_names=("replica", "inner"))
    return mesh.get_group("replica"), mesh.get_group("inner")


def attach(world, size, model, hook=None, **options):
    """The model in DistributedDataParallel, and its optimizer with a hook of two levels over EXACT."""
    group, inner_group = groups_of(world, size)
    optimizer = CurvaDion(split_parameters(model), lr=0.02, **options)
    sync = ProcessGroupSync(**{**EXACT, **(hook or {})}, group=group, inner_group=inner_group)
    optimizer.register_sync_hook(sync)
    module = DistributedDataParallel(model, process_group=inner_group)
    sync.include_module(module)
    return module, optimizer
