"""A GPT-2-sized language model and its learning-rate schedule, for ``configs/gpt_160m_multinode.yaml``.

The module has no ``configure_optimizers``. The config names optimizer, parameter groups and schedule instead.
"""

import math

import lightning.pytorch as pl
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from examples.byte_gpt import GPT


class LanguageModel(pl.LightningModule):
    """Trains a :class:`~examples.byte_gpt.GPT` with next-token cross entropy.

    The defaults have 162 million parameters: 85 in the blocks, 39 in the embedding and 39 in the output head.

    Args:
        vocabulary: Size of the vocabulary. The default is GPT-2's 50257, rounded up to a multiple of 128.
        layers: Number of blocks.
        width: Width of the residual stream.
        heads: Number of attention heads.
        context: Tokens per sequence.

    Example:
        >>> model = LanguageModel(vocabulary=512, layers=1, width=32, heads=2, context=16)
        >>> sum(parameter.numel() for parameter in model.parameters())
        45152
    """

    def __init__(
        self, vocabulary: int = 50304, layers: int = 12, width: int = 768, heads: int = 12, context: int = 1024
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.gpt = GPT(layers, width, heads, context, vocabulary)

    def cross_entropy(self, batch: Tensor) -> Tensor:
        """Mean loss in nats per token of a batch of shape (sequences, context + 1)."""
        logits = self.gpt(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return and log the loss."""
        loss = self.cross_entropy(batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the loss of the consensus."""
        self.log("val_loss", self.cross_entropy(batch), prog_bar=True, sync_dist=True)


class WarmupCosine(LambdaLR):
    """Linear warm-up, then half a cosine down to a fraction of the peak. Each group has its own peak.

    Call ``step()`` once per optimizer step.

    Args:
        optimizer: The optimizer whose learning rates change.
        warmup_steps: Steps of the warm-up.
        total_steps: Steps of the run.
        final: Fraction of the peak at the end of the run and after it.

    Raises:
        ValueError: ``total_steps`` is not larger than ``warmup_steps``.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=8.0)
        >>> schedule = WarmupCosine(optimizer, warmup_steps=4, total_steps=8)
        >>> rates = []
        >>> for _ in range(9):
        ...     rates.append(round(schedule.get_last_lr()[0], 2))
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [2.0, 4.0, 6.0, 8.0, 8.0, 6.95, 4.4, 1.85, 0.8]
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int, total_steps: int, final: float = 0.1) -> None:
        if total_steps <= warmup_steps:
            raise ValueError(f"total_steps={total_steps} must be larger than warmup_steps={warmup_steps}")

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
            return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

        super().__init__(optimizer, factor)
