"""Checkpoints of sharded modules: a directory, to which each process writes its shards, or none.

The format is that of ``torch.distributed.checkpoint`` and of Lightning's own sharded strategies: ``"model"`` and
``"optimizer_0"`` and on as tensors, all else of a Trainer's checkpoint in ``meta.pt``. Another number of processes or
replicas reads it, and ``python -m lightning.pytorch.utilities.consolidate_checkpoint`` makes a file of it.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer

from .checkpoint_io import part_beside, remove, remove_abandoned_parts, sync_directory

T = TypeVar("T")
_OTHERS = "meta.pt"


def is_sharded_checkpoint(path: Path) -> bool:
    """Whether a path is a directory of shards, as this module and Lightning's sharded strategies write."""
    return path.is_dir() and (path / ".metadata").is_file()


def save(checkpoint: dict[str, Any], path: str, broadcast: Callable[[str], str]) -> None:
    """Write a Trainer's checkpoint of a sharded module; every process calls it.

    It is written beside its place, flushed to the disk and renamed, as a file is (``checkpoint_io.py``).

    Args:
        checkpoint: Whole, but for tensors that are sharded.
        path: Of the directory.
        broadcast: Takes what rank 0 gives.

    Raises:
        MisconfigurationException: The path is remote.
    """
    # Seconds to import.
    from torch.distributed.checkpoint.state_dict_saver import save as save_shards

    if "://" in path:
        raise MisconfigurationException(
            f"save checkpoints of a sharded module to a folder that all processes see, not to {path}: each of them"
            " writes its shards"
        )
    place = Path(broadcast(path))
    part = Path(broadcast(str(part_beside(place))))
    others = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
    shards = {"model": checkpoint["state_dict"], **_numbered(checkpoint.get("optimizer_states", ()))}
    try:
        save_shards(shards, checkpoint_id=part)
    except BaseException:
        # All processes raise what one of them has met.
        if dist.get_rank() == 0 and part.exists():
            remove(part)
        raise
    if dist.get_rank() == 0:
        with (part / _OTHERS).open("xb") as file:
            torch.save(others, file)
            file.flush()
            os.fsync(file.fileno())
        sync_directory(part)
        remove_abandoned_parts(place.parent, now=part.stat().st_mtime)
        # A directory takes the place of nothing but an empty one.
        before = part_beside(place)
        if place.exists() or place.is_symlink():
            os.rename(place, before)
        os.rename(part, place)
        sync_directory(place.parent)
        if before.exists() or before.is_symlink():
            remove(before)


def load(
    path: Path, module: nn.Module, optimizers: Sequence[Optimizer], read: Callable[[Path], dict[str, Any]]
) -> dict[str, Any]:
    """Read a Trainer's checkpoint from a directory of shards; every process calls it.

    Args:
        path: Of the directory.
        module: Sharded. Its tensors are overwritten by those of their names.
        optimizers: Of the module; none where it is only evaluated.
        read: Reads a file, for all that is no tensor of these.

    Returns:
        The checkpoint, whole but for tensors, which are sharded as the module's are. Names that only one of the two has
        are in its ``"state_dict"`` as a strict load reports them.

    Raises:
        MisconfigurationException: The directory has another strategy's names.
    """
    # Seconds to import.
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load as load_shards

    names = FileSystemReader(path).read_metadata().state_dict_metadata
    weights = {name.removeprefix("model.") for name in names if name.startswith("model.")}
    if not weights:
        raise MisconfigurationException(
            f"{path} holds no weights of a Trainer under `model`, but {', '.join(sorted(names)[:3])} and others; load"
            " it with the strategy that wrote it"
        )
    present = module.state_dict()
    numbered = _numbered([optimizer.state_dict() for optimizer in optimizers])
    saved = {key: own for key, own in numbered.items() if any(name.startswith(f"{key}.") for name in names)}
    state = {"model": {name: present[name] for name in present if name in weights}, **saved}
    # The state of an optimizer may have more, such as residuals of a quantized format, which start anew.
    load_shards(state, checkpoint_id=path, planner=DefaultLoadPlanner(allow_partial_load=True))
    loaded = read(path / _OTHERS)
    loaded["state_dict"] = {**state["model"], **{name: torch.empty(0) for name in weights - present.keys()}}
    if saved:
        loaded["optimizer_states"] = [state[key] for key in saved]
    return loaded


def load_weights(module: nn.Module, weights: Mapping[str, Any], strict: bool) -> None:
    """``module.load_state_dict``, of whole or sharded weights into a sharded module.

    Args:
        module: Sharded.
        weights: By name.
        strict: Whether names that only one of the two has are an error.
    """
    # Seconds to import.
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(module, dict(weights), options=StateDictOptions(full_state_dict=True, strict=strict))


def _numbered(states: Sequence[T]) -> Mapping[str, T]:
    return {f"optimizer_{number}": state for number, state in enumerate(states)}
