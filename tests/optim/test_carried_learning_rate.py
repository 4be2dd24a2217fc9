"""A learning rate tuned for AdamW carries over with ``lr_scale="match_rms_adamw"``: models trained, and swept."""

from collections.abc import Callable, Iterable
from statistics import mean

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_curvadion import CurvaDion, split_parameters

STEPS, WARMUP, BATCH, TRAIN = 200, 20, 32, 1000
SEEDS = (0, 1)
NOISE = 0.5
OF_ADAMW = (0.004, 0.008, 0.016)
OF_MATRICES, OF_THE_REST = (0.01, 0.02, 0.04), (0.5, 1.0, 2.0)


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


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    data = pytest.importorskip("sklearn.datasets").load_digits()
    return torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)


def trained(model: Callable[[], nn.Module], optimizer: Callable[[nn.Module], torch.optim.Optimizer], digits) -> float:
    """Loss on noisy images that the model has not seen, a mean over the seeds."""
    return mean(trained_from(seed, model, optimizer, *digits) for seed in SEEDS)


def trained_from(seed, model, optimizer, images, targets) -> float:
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


def best(losses: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """The lowest loss, and the learning rate it was found at."""
    return min(losses)


@pytest.mark.parametrize("model", [convolutions, Rows, Encoder], ids=["convolutions", "lstm", "transformer"])
def test_adamws_best_rate_ends_within_five_percent_of_a_sweep_of_ours(model, digits):
    of_adamw, lr = best(
        (trained(model, lambda net, lr=lr: torch.optim.AdamW(net.parameters(), lr=lr), digits), lr) for lr in OF_ADAMW
    )
    carried = trained(model, lambda net: CurvaDion(split_parameters(net), lr=lr, lr_scale="match_rms_adamw"), digits)
    swept = min(
        trained(
            model,
            lambda net, own=own, share=share: CurvaDion(
                split_parameters(net, options={"adamw": {"lr": share * lr}}), lr=own
            ),
            digits,
        )
        for own in OF_MATRICES
        for share in OF_THE_REST
    )
    print(f"\n{carried:.3f} at AdamW's rate of {lr}; {swept:.3f} swept; AdamW {of_adamw:.3f}")
    assert carried < 1.05 * swept
