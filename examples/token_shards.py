"""Windows of tokenised text, memory-mapped from many files: the data of ``configs/gpt_160m_multinode.yaml``.

A file, or shard, is one of

- ``.bin``: uint16 tokens without a header, as nanoGPT writes them;
- ``.bin``: uint16 tokens after llm.c's header of 256 int32 (magic number, version, number of tokens);
- ``.npy``: a one-dimensional array of integers.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

# llm.c's header of GPT-2 tokens: dev/data/data_common.py there.
MAGIC, VERSION, HEADER = 20240520, 1, 256 * 4


@dataclass(frozen=True)
class Shard:
    """Position of the tokens in a file.

    Attributes:
        path: The file.
        dtype: Data type of a token.
        offset: Bytes before the first token.
        tokens: Number of tokens.
    """

    path: Path
    dtype: np.dtype
    offset: int
    tokens: int

    def read(self, start: int, count: int) -> Tensor:
        """``count`` tokens from ``start``, as int64. Nothing else of the file is read."""
        offset = self.offset + start * self.dtype.itemsize
        # A new map per window: pickling an open one for a spawned worker would copy the whole file.
        return torch.from_numpy(np.memmap(self.path, self.dtype, "r", offset, (count,)).astype(np.int64))


def open_shard(path: Path) -> Shard:
    """Read a file's header and size.

    Raises:
        ValueError: The file is none of the three kinds, or its size does not match its header.
    """
    if path.suffix == ".npy":
        array = np.load(path, mmap_mode="r")
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"{path} has shape {array.shape} and {array.dtype}; a shard is one row of integers")
        return Shard(path, array.dtype, array.offset, len(array))
    if path.suffix != ".bin":
        raise ValueError(f"{path} is no shard: tokens come as .bin (uint16) or .npy")
    size, uint16 = path.stat().st_size, np.dtype("<u2")
    header = np.fromfile(path, "<i4", 3)
    if len(header) == 3 and header[0] == MAGIC:
        tokens = int(header[2])
        if header[1] != VERSION or size != HEADER + tokens * uint16.itemsize:
            raise ValueError(
                f"{path} has {size} bytes and a header of version {header[1]} with {tokens} tokens; it should be"
                f" version {VERSION} and {HEADER + tokens * uint16.itemsize} bytes. Was the file truncated?"
            )
        return Shard(path, uint16, HEADER, tokens)
    if size % uint16.itemsize:
        raise ValueError(f"{path} has an odd number of bytes, {size}, and cannot be uint16 tokens")
    return Shard(path, uint16, 0, size // uint16.itemsize)


class TokenWindows(Dataset[Tensor]):
    """Windows of ``length + 1`` tokens, ``length`` apart: every token but a shard's first is predicted once.

    A window lies within one shard. The remainder of a shard is not used.

    Args:
        paths: The shards.
        length: Tokens per sequence.

    Raises:
        ValueError: No shard holds a whole window, or a file is not a shard.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     np.arange(9, dtype=np.uint16).tofile(Path(folder) / "a.bin")
        ...     np.save(Path(folder) / "b.npy", np.arange(100, 106))
        ...     windows = TokenWindows(sorted(Path(folder).iterdir()), length=4)
        ...     [window.tolist() for window in windows]
        [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [100, 101, 102, 103, 104]]
    """

    def __init__(self, paths: Sequence[Path], length: int) -> None:
        self.length = length
        self.shards = [open_shard(path) for path in paths]
        self.ends = list(accumulate(max(0, shard.tokens - 1) // length for shard in self.shards))
        if len(self) == 0:
            raise ValueError(f"none of {len(paths)} shards holds {length + 1} tokens, the size of a window")

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect_right(self.ends, index)
        window = index - (self.ends[shard - 1] if shard else 0)
        return self.shards[shard].read(window * self.length, self.length + 1)


class ResumableLoader(DataLoader[Tensor]):
    """A loader with a position, which a Trainer saves and restores within an epoch.

    Resuming reads and drops the windows before the position, which is cheap for a mapped file. The position counts the
    windows of all replicas, so that a run can resume on another number of them.

    Example:
        >>> loader = ResumableLoader(range(6), batch_size=2)
        >>> batches = iter(loader)
        >>> next(batches), loader.state_dict()
        (tensor([0, 1]), {'windows': 2})
        >>> resumed = ResumableLoader(range(6), batch_size=2)
        >>> resumed.load_state_dict({"windows": 2})
        >>> list(resumed)
        [tensor([2, 3]), tensor([4, 5])]
    """

    batches_taken = 0
    resume_at = 0

    def __iter__(self) -> Iterator[Tensor]:  # type: ignore[override]
        self.batches_taken, self.resume_at = self.resume_at, 0
        for batch in islice(super().__iter__(), self.batches_taken, None):
            self.batches_taken += 1
            yield batch

    @property
    def windows_per_batch(self) -> int:
        """Windows in a batch of all replicas together."""
        return (self.batch_size or 1) * getattr(self.sampler, "num_replicas", 1)

    def state_dict(self) -> dict[str, int]:
        """The position in the epoch."""
        return {"windows": self.batches_taken * self.windows_per_batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next epoch at the position; the end of an epoch is the start of the next."""
        self.resume_at = state["windows"] // self.windows_per_batch % len(self)


class TokenShards(pl.LightningDataModule):
    """A folder of shards. Lightning's DistributedSampler distributes the windows over the replicas.

    Every node needs the folder, on a shared disk or as its own copy.

    Args:
        folder: Folder of the shards.
        context: Tokens per sequence.
        batch_size: Sequences per replica and step.
        train: File name pattern of the training shards.
        val: File name pattern of the validation shards.
        workers: Worker processes of the loader, per replica.
    """

    def __init__(
        self,
        folder: str,
        context: int = 1024,
        batch_size: int = 16,
        train: str = "*train*",
        val: str = "*val*",
        workers: int = 2,
    ) -> None:
        super().__init__()
        self.folder, self.patterns = Path(folder), {"train": train, "val": val}
        self.context, self.batch_size, self.workers = context, batch_size, workers

    def windows(self, part: str) -> TokenWindows:
        """All windows of ``"train"`` or ``"val"``.

        Raises:
            ValueError: The folder has no such file.
        """
        paths = sorted(path for path in self.folder.glob(self.patterns[part]) if path.suffix in (".bin", ".npy"))
        if not paths:
            raise ValueError(
                f"no shards for {part}: {self.folder.absolute()} has no .bin or .npy file named {self.patterns[part]}."
                " Set the folder with --data.folder, and the file names with --data.train and --data.val."
            )
        return TokenWindows(paths, self.context)

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Training windows, shuffled over all shards. The loader resumes within an epoch."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Validation windows, in order."""
        return self._loader("val", shuffle=False)

    def _loader(self, part: str, shuffle: bool) -> DataLoader[Tensor]:
        return ResumableLoader(
            self.windows(part),
            batch_size=self.batch_size,
            # As a keyword, or Lightning cannot replace the sampler by its DistributedSampler.
            shuffle=shuffle,
            drop_last=shuffle,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.workers > 0,
        )
