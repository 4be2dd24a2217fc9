"""A byte-level GPT on the source files of Python's standard library, real text that every machine has."""

import hashlib
import math
import os
import sysconfig
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from lightning_curvadion import CurvaDion, split_parameters

# For ``options`` of ``split_parameters``: queries, keys and values of an attention are one matrix. By default each is a
# matrix; this is how the figures of the README, and of all benchmarks of this model, were measured.
WHOLE = {"dion": {"packed": 1}}


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary position embedding (Su et al., 2021, arXiv:2104.09864) of x of shape (batch, heads, time, size)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


class Block(nn.Module):
    """Pre-norm transformer block: causal attention with rotary positions, then an MLP of four times the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape."""
        batch, time, width = x.shape
        split = self.qkv(self.attention_norm(x)).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(
            rotate(query, cosine, sine), rotate(key, cosine, sine), value, is_causal=True
        )
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class GPT(nn.Module):
    """Decoder-only transformer with an untied output head. The default vocabulary is the 256 bytes."""

    cosine: Tensor
    sine: Tensor

    def __init__(self, layers: int, width: int, heads: int, context: int, vocabulary: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        half = width // heads // 2
        angles = torch.outer(torch.arange(context), 10000.0 ** -(torch.arange(half) / half))
        # Not persistent: computed, so neither saved nor synchronised.
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            if name.endswith(("out.weight", "down.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens of shape (batch, time) to logits of shape (batch, time, vocabulary)."""
        time = tokens.shape[1]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cosine[:time], self.sine[:time])
        return self.head(self.norm(x))


def warmup_and_cooldown(step: int, total: float, warmup: int = 20, cooldown: float = 0.5) -> float:
    """Factor of the learning rate: it rises over ``warmup`` steps and falls to zero over the last ``cooldown`` of all.

    Example:
        >>> [warmup_and_cooldown(step, total=8, warmup=2) for step in range(8)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    return min(1.0, (step + 1) / warmup, (total - step) / max(1, cooldown * total))


class ByteGPT(pl.LightningModule):
    """Trains a :class:`GPT` with next-byte cross entropy.

    Args:
        optimizer: Builds the optimizer from the groups of ``split_parameters``.
        layers: Number of blocks.
        width: Width of the residual stream.
        heads: Number of attention heads.
        context: Bytes per sequence.
        vector_lr: Learning rate of the AdamW groups: embeddings, output head and norms.
        warmup_steps: Steps over which the learning rate rises.
        cooldown: Final fraction of the run, over which the learning rate falls to zero.
    """

    def __init__(
        self,
        optimizer: Callable[[Iterable[Any]], Optimizer] = CurvaDion,
        layers: int = 4,
        width: int = 96,
        heads: int = 4,
        context: int = 128,
        vector_lr: float = 0.003,
        warmup_steps: int = 20,
        cooldown: float = 0.5,
    ) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.vector_lr = vector_lr
        self.warmup_steps = warmup_steps
        self.cooldown = cooldown
        self.gpt = GPT(layers, width, heads, context)

    def cross_entropy(self, batch: Tensor) -> Tensor:
        """Mean loss in nats per byte of a batch of shape (sequences, context + 1)."""
        logits = self.gpt(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return and log the loss."""
        loss = self.cross_entropy(batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the loss in nats and in bits per byte."""
        loss = self.cross_entropy(batch)
        self.log("val_loss", loss, prog_bar=True, sync_dist=True)
        self.log("val_bits_per_byte", loss / math.log(2), sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer, with linear warm-up and linear cooldown to zero."""
        optimizer = self.optimizer(split_parameters(self, options={"adamw": {"lr": self.vector_lr}, **WHOLE}))
        total = self.trainer.estimated_stepping_batches
        factor = partial(warmup_and_cooldown, total=total, warmup=self.warmup_steps, cooldown=self.cooldown)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Windows(Dataset[Tensor]):
    """Windows of a memory-mapped file of bytes.

    Args:
        path: The file.
        length: Bytes per window.
        stride: Distance between the starts of two windows.
    """

    def __init__(self, path: Path, length: int, stride: int) -> None:
        self.data = np.memmap(path, dtype=np.uint8, mode="r")
        self.length, self.stride = length, stride

    def __len__(self) -> int:
        return max(0, (len(self.data) - self.length) // self.stride + 1)

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.stride
        return torch.from_numpy(self.data[start : start + self.length].astype(np.int64))


class StandardLibrary(pl.LightningDataModule):
    """Source files of Python's standard library. Nine in ten files train, one validates.

    Args:
        context: Bytes per sequence.
        batch_size: Sequences per replica and step.
        val_sequences: Number of validation windows, evenly spread over the files.
        cache: Folder for ``train.bin`` and ``val.bin``.
    """

    def __init__(
        self, context: int = 128, batch_size: int = 12, val_sequences: int = 512, cache: str = ".data"
    ) -> None:
        super().__init__()
        self.context, self.batch_size, self.val_sequences = context, batch_size, val_sequences
        self.cache = Path(cache)

    def files(self) -> Iterable[tuple[str, Path]]:
        """The files of the corpus in a fixed order, each with its name below the root."""
        root = Path(sysconfig.get_paths()["stdlib"])
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root).as_posix()
            if name.startswith(("site-packages/", "dist-packages/", "test/", "idlelib/")) or "/tests/" in name:
                continue
            yield name, path

    def prepare_data(self) -> None:
        """Write ``train.bin`` and ``val.bin`` once per node, each atomically."""
        self.cache.mkdir(parents=True, exist_ok=True)
        parts: dict[str, list[bytes]] = {"train": [], "val": []}
        for name, path in self.files():
            # By a digest of the name: another file in the library moves no file to the other split.
            digest = hashlib.sha256(name.encode()).digest()
            parts["val" if digest[0] < 26 else "train"].append(path.read_bytes())
        for name, contents in parts.items():
            partial = self.cache / f"{name}.bin.{os.getpid()}"
            partial.write_bytes(b"\0".join(contents))
            partial.replace(self.cache / f"{name}.bin")

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Windows without overlap, shuffled."""
        data = Windows(self.cache / "train.bin", self.context + 1, self.context)
        return DataLoader(data, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """The same windows at every validation."""
        path = self.cache / "val.bin"
        stride = max(1, path.stat().st_size // (self.val_sequences + 1))
        return DataLoader(Windows(path, self.context + 1, stride), 4 * self.batch_size)
