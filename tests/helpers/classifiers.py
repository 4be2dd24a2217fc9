"""Small classifiers of noisy digits, and how they are trained."""

from collections.abc import Callable, Sequence
from functools import partial
from statistics import mean

import pytest
import torch
from replicas import Replicas
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from lightning_curvadion import CurvaDion, split_parameters

STEPS, WARMUP, BATCH, TRAIN = 200, 20, 32, 1000
SEEDS = (0, 1)
NOISE = 0.5


class Rows(nn.Module):
    """An LSTM that reads an image row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 48, batch_first=True)
        self.head = nn.Linear(48, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.lstm(images)[0][:, -1])


class Encoder(nn.Module):
    """A transformer whose tokens are the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(8, 32)
        self.positions = nn.Parameter(0.02 * torch.randn(8, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(images) + self.positions).mean(dim=1))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


CLASSIFIERS = {"convolutions": convolutions, "lstm": Rows, "transformer": Encoder}


def load_digits() -> tuple[Tensor, Tensor]:
    """Images and labels of scikit-learn's digits."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    return torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)


def adamw(module: nn.Module, lr: float) -> Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=lr)


def curvadion(module: nn.Module, lr: float) -> Optimizer:
    return CurvaDion(split_parameters(module), lr=lr, lr_scale="match_rms_adamw")


def trained(
    model: Callable[[], nn.Module],
    optimizers: Sequence[partial[Optimizer]],
    digits: tuple[Tensor, Tensor],
    replicas: Replicas,
) -> list[float]:
    """Losses on noisy images that the model has not seen, one for each optimizer; means over the seeds."""
    jobs = [(seed, model, optimizer, *digits) for optimizer in optimizers for seed in SEEDS]
    losses = replicas.map(trained_from, jobs)
    return [mean(losses[first : first + len(SEEDS)]) for first in range(0, len(losses), len(SEEDS))]


def trained_from(
    seed: int, model: Callable[[], nn.Module], optimizer: partial[Optimizer], images: Tensor, targets: Tensor
) -> float:
    torch.manual_seed(seed)
    net, generator = model(), torch.Generator().manual_seed(seed)
    steps = optimizer(net)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        steps, lambda step: min(1.0, (step + 1) / WARMUP, 2 * (STEPS - step) / STEPS)
    )
    for _ in range(STEPS):
        chosen = torch.randint(0, TRAIN, (BATCH,), generator=generator)
        noise = NOISE * torch.randn(BATCH, 8, 8, generator=generator)
        steps.zero_grad()
        F.cross_entropy(net(images[chosen] + noise), targets[chosen]).backward()
        steps.step()
        schedule.step()
    held_out = images[TRAIN:] + NOISE * torch.randn(len(images) - TRAIN, 8, 8, generator=generator)
    with torch.no_grad():
        return F.cross_entropy(net.eval()(held_out), targets[TRAIN:]).item()
