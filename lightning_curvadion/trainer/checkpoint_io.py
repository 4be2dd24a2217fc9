"""AtomicCheckpointIO: a checkpoint file is complete, or it does not exist."""

import os
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

_PART = re.compile(r"\..+\.[0-9a-f]{16}\.part")
_ABANDONED_AFTER = 3600.0


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written atomically.

    A local file is written beside its place, as ``.NAME.RANDOM.part``, flushed to the disk, and renamed. Processes that
    save to one path at the same time do not interfere: the last to finish has its checkpoint there. (Lightning itself
    writes to the folder for temporary files and copies from there where that is another disk.) Remote files are left to
    Lightning.

    A process that is killed meanwhile leaves the previous checkpoint intact, and its ``.part``. A later save into the
    folder removes it, once nobody has written to it for an hour.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any = None) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        part = part_beside(place)
        try:
            with part.open("xb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            remove_abandoned_parts(place.parent, now=part.stat().st_mtime)
            os.replace(part, place)
        finally:
            part.unlink(missing_ok=True)
        sync_directory(place.parent)

    @override
    def load_checkpoint(self, path: _PATH, *args: Any, **options: Any) -> dict[str, Any]:
        if Path(path).is_dir():
            raise MisconfigurationException(
                f"{path} is a directory, as checkpoints of sharded modules are, and this module is whole."
                f" `python -m lightning.pytorch.utilities.consolidate_checkpoint {path}` makes a file of it"
            )
        return super().load_checkpoint(path, *args, **options)


def part_beside(place: Path) -> Path:
    """A new path beside a checkpoint's, for what is not complete yet or is about to go."""
    return place.with_name(f".{place.name}.{secrets.token_hex(8)}.part")


def remove_abandoned_parts(folder: Path, now: float) -> None:
    """Remove what killed processes left. ``now`` is by the clock of the file system, which may be another machine's."""
    for path in folder.iterdir():
        if _PART.fullmatch(path.name):
            # Another process may remove it too.
            with suppress(OSError):
                if path.stat().st_mtime < now - _ABANDONED_AFTER:
                    remove(path)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def sync_directory(folder: Path) -> None:
    """Flush a rename to the disk: the caller may delete an earlier checkpoint next."""
    # Not every system opens directories, and not every file system flushes them.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
