"""AtomicCheckpointIO: a checkpoint file is complete, or not there."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, moved into place only once they are written.

    A local file is written beside its place, under its name with a dot before and ``.part`` behind, reaches the disk,
    and takes its place in one step. (Lightning's own goes through the folder for temporary files, and is copied where
    that is another disk.) A process killed on the way leaves the checkpoint before as it was. Remote files are left to
    Lightning.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any = None) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_name(f".{place.name}.part")
        try:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, place)
        finally:
            part.unlink(missing_ok=True)

    @override
    def load_checkpoint(self, path: _PATH, *args: Any, **options: Any) -> dict[str, Any]:
        if Path(path).is_dir():
            raise MisconfigurationException(
                f"{path} is a directory, as sharded checkpoints are; the curvadion strategy reads files, since every"
                f" replica holds the whole model. `python -m lightning.pytorch.utilities.consolidate_checkpoint {path}`"
                " makes a file of it"
            )
        return super().load_checkpoint(path, *args, **options)
