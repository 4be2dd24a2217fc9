"""Checks of what is sharded inside of a replica: by ``fully_shard``, over all its processes, or not at all."""

import sys
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed import ProcessGroup, get_process_group_ranks

from ..optim.curvadion import CurvaDion
from ..optim.shards import is_sharded
from .settings import SyncSettings


def holds_shards(optimizer: CurvaDion) -> bool:
    """Whether any parameter of an optimizer is sharded."""
    return any(is_sharded(parameter) for _, parameter in optimizer.named_parameters())


def check_sharding(
    optimizer: CurvaDion,
    inner_group: ProcessGroup | None,
    settings: SyncSettings,
    others: Sequence[CurvaDion] = (),
) -> None:
    """Check that the sharded parameters of an optimizer can be trained.

    Args:
        optimizer: Its parameters are whole, or cut by rows over one mesh dimension each.
        inner_group: The processes of this replica; ``None`` where it is one process.
        settings: Of the hook.
        others: The optimizers that the hook has already.

    Raises:
        ValueError: They cannot, naming the parameter or the setting and the remedy.
    """
    if others and holds_shards(others[0]) != holds_shards(optimizer):
        raise ValueError(
            "give sharded parameters and whole ones hooks of their own: this one has an optimizer of the other kind"
        )
    if not holds_shards(optimizer):
        return
    for name, parameter in optimizer.named_parameters():
        _check_mesh(name, parameter, inner_group)
    if not settings.sends_parameters_alone or settings.has_outer_step:
        raise ValueError(
            'sharded parameters need consensus="average" with momentum="displacement" or "local" and no outer step,'
            f" which send nothing but shards: not consensus={settings.consensus!r}, momentum={settings.momentum!r},"
            f" outer_lr={settings.outer_lr}, outer_momentum={settings.outer_momentum}. For these, wrap the module in"
            " DistributedDataParallel instead of fully_shard"
        )


def _check_mesh(name: str, parameter: Tensor, inner_group: ProcessGroup | None) -> None:
    if inner_group is None:
        raise ValueError(
            f"{name} is sharded over several processes: give ProcessGroupSync their process group as inner_group, and"
            " as group this process and its counterparts in the other replicas, such as"
            ' ProcessGroupSync(mesh.get_group("replica"), inner_group=mesh.get_group("inner"))'
        )
    if not is_sharded(parameter):
        raise ValueError(
            f"{name} is whole where others are sharded: call fully_shard on the outermost module too, without"
            " ignored_params, and leave out tensor parallelism"
        )
    ranks = cast(Any, parameter).device_mesh.mesh.flatten().tolist()
    own = get_process_group_ranks(inner_group)
    if ranks != own:
        raise ValueError(
            f"call fully_shard with the mesh of inner_group: {name} is sharded over ranks {ranks}, but a replica"
            f" consists of ranks {own}"
        )


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on a module or a part of it."""
    return bool(_sharded_parts(module))


def reshard(module: nn.Module) -> None:
    """Let a module that was evaluated give up the whole parameters it may still hold, which are about to change."""
    for part in _sharded_parts(module):
        part.reshard()


def refuse_flat_parameters(module: nn.Module) -> None:
    """Check that no matrix is hidden in a flat parameter.

    Raises:
        ValueError: A part is wrapped in ``FullyShardedDataParallel``.
    """
    for name, part in module.named_modules():
        if isinstance(part, _fsdp_class("FullyShardedDataParallel")):
            raise ValueError(
                f"shard by fully_shard in place of FullyShardedDataParallel, which makes one vector of the matrices of"
                f" {name or 'the module'}"
            )


def _sharded_parts(module: nn.Module) -> list[Any]:
    return [part for part in module.modules() if isinstance(part, _fsdp_class("FSDPModule"))]


def _fsdp_class(name: str) -> Any:
    # It takes seconds to import: where nobody has, nothing is sharded.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return () if fsdp is None else getattr(fsdp, name)
