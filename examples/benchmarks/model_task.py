"""What every model of ``models.py`` has in common: one way to make its optimizer, and one to be judged."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from typing import Any, ClassVar, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from examples.byte_gpt import warmup_and_cooldown
from lightning_curvadion import split_parameters

Batch = list[Tensor]


class Score(NamedTuple):
    """How good a trained model is on data that it has not seen. A model without classes has no accuracy: NaN."""

    loss: float
    accuracy: float


class ModelTask(pl.LightningModule):
    """A model with its data, its length of training and its learning rates.

    Args:
        optimizer: Builds an optimizer from the groups of ``split_parameters``.
        steps: Steps of the run, and of its schedule.

    Attributes:
        length: Steps of a run.
        batch_size: Sequences or images per replica and step.
        adamw_rates: Learning rates of AdamW that are tried.
        muon_rates: Learning rates of Muon and of CurvaDion that are tried, each for all parameters.
        trainer_options: What the Trainer needs beside the strategy.
        seeds: Of the runs at the best learning rate.
        optimizers_per_step: Optimizers that step on a batch. With more than one, a backward pass leaves out the
            parameters of the others.
        overrides: Of ``split_parameters``.
    """

    length: ClassVar[int]
    batch_size: ClassVar[int] = 8
    adamw_rates: ClassVar[tuple[float, ...]] = (0.002, 0.004, 0.008)
    muon_rates: ClassVar[tuple[float, ...]] = (0.008, 0.016, 0.032)
    trainer_options: ClassVar[dict[str, Any]] = {}
    seeds: ClassVar[Sequence[int]] = (0, 1, 2)
    optimizers_per_step: ClassVar[int] = 1
    overrides: ClassVar[dict[str, Any]] = {}

    def __init__(self, optimizer: Callable[[Iterable[Any]], Optimizer], steps: int) -> None:
        super().__init__()
        self.optimizer, self.steps = optimizer, steps

    @classmethod
    def prepare(cls, steps: int) -> None:
        """Write what the replicas read. Called once, before they start.

        Args:
            steps: Steps of the runs.
        """

    def data(self) -> DataLoader[Any]:
        """Batches to train on, shuffled."""
        raise NotImplementedError

    def logits_and_targets(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Logits of shape (n, classes), and n classes."""
        raise NotImplementedError

    def held_out(self) -> Iterable[Any]:
        """Batches that are not trained on, the same for every run."""
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Cross entropy."""
        return F.cross_entropy(*self.logits_and_targets(batch))

    @torch.no_grad()
    def score(self, batches: int | None = None) -> Score:
        """Cross entropy and accuracy on held-out data.

        Args:
            batches: How many batches of it, all by default.
        """
        self.eval()
        loss, right, count = 0.0, 0, 0
        for batch in islice(self.held_out(), batches):
            logits, targets = self.logits_and_targets(batch)
            loss += F.cross_entropy(logits.float(), targets, reduction="sum").item()
            right += int((logits.argmax(dim=1) == targets).sum())
            count += len(targets)
        return Score(loss / count, right / count)

    def optimizer_with_schedule(self, module: nn.Module) -> dict[str, Any]:
        """The optimizer of a module, with linear warm-up and a linear fall to zero over the second half."""
        optimizer = self.optimizer(split_parameters(module, self.overrides))
        schedule = LambdaLR(optimizer, partial(warmup_and_cooldown, total=self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_optimizers(self) -> Any:
        """One optimizer for the whole model."""
        return self.optimizer_with_schedule(self)
