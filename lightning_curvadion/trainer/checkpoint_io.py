"""AtomicCheckpointIO: a checkpoint file is complete, or it does not exist."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written atomically.

    A local file is written beside its place, as ``.NAME.part``, flushed to the disk, and renamed. A process that is
    killed meanwhile leaves the previous checkpoint intact. (Lightning itself writes to the folder for temporary files
    and copies from there where that is another disk.) Remote files are left to Lightning.
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
