"""Image models of ``models.py``, on scikit-learn's digits: a ResNet, a vision transformer and a GAN."""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from examples.benchmarks.model_task import Batch, ModelTask, Score
from examples.digits_resnet import resnet
from examples.digits_vit import Digits, DigitsViT


def digits(batch_size: int) -> Digits:
    """The digits, loaded and split."""
    data = Digits(batch_size)
    data.setup("fit")
    return data


def distorted(
    images: Tensor, side: int, margin: float, noise: float, generator: torch.Generator | None = None
) -> Tensor:
    """Digits of other size, angle and place, under noise and the shadow of another digit.

    Without it the digits are too easy to tell methods apart: 97 % are right within seconds.

    Args:
        images: Shape (n, 1, 8, 8).
        side: Side of the result, in pixels.
        margin: How much wider than the digit the result may be.
        noise: Standard deviation of the noise; ink has 1.
        generator: Of the random numbers; by default torch's own.

    Returns:
        Shape (n, 1, side, side).
    """

    def moved(pictures: Tensor) -> Tensor:
        size, angle, right, down = torch.rand(4, len(pictures), generator=generator)
        zoom = 1.0 + margin * size
        cosine, sine = zoom * torch.cos(0.8 * (angle - 0.5)), zoom * torch.sin(0.8 * (angle - 0.5))
        rows = [cosine, -sine, (zoom - 1) * (2 * right - 1), sine, cosine, (zoom - 1) * (2 * down - 1)]
        grid = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), [len(pictures), 1, side, side], False)
        return F.grid_sample(pictures, grid, align_corners=False)

    shadow = images[torch.randperm(len(images), generator=generator)]
    return moved(images) + 0.4 * moved(shadow) + noise * torch.randn(len(images), 1, side, side, generator=generator)


class DistortedDigits(ModelTask):
    """A classifier of distorted digits. Every training step distorts them anew."""

    side: ClassVar[int] = 8
    margin: ClassVar[float] = 0.25
    noise: ClassVar[float] = 0.1
    batch_size = 16

    def __init__(self, optimizer: Callable[[Iterable[Any]], Optimizer], steps: int) -> None:
        super().__init__(optimizer, steps)
        self.net = self.build()

    def build(self) -> nn.Module:
        """The classifier."""
        raise NotImplementedError

    def data(self) -> DataLoader[Any]:
        """1437 digits."""
        return digits(self.batch_size).train_dataloader()

    def distorted(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The images as this model sees them."""
        return distorted(images, self.side, self.margin, self.noise, generator)

    def logits_and_targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits of the ten digits."""
        images, labels = batch
        return self.net(self.distorted(images) if self.training else images), labels

    def held_out(self) -> Iterable[Batch]:
        """The 360 other digits, each distorted eight times."""
        generator = torch.Generator().manual_seed(0)
        for _ in range(8):
            for images, labels in digits(self.batch_size).val_dataloader():
                yield [self.distorted(images, generator), labels]


class ResNet(DistortedDigits):
    """The ResNet of ``examples/digits_resnet.py``."""

    muon_rates = (0.016, 0.032, 0.064)
    length, side, margin, noise = 400, 16, 0.6, 0.4

    def build(self) -> nn.Module:
        """Three stages of 16, 32 and 64 channels."""
        return resnet(width=16)


class ViT(DistortedDigits):
    """The vision transformer of ``examples/digits_vit.py``."""

    length = 500
    adamw_rates = (0.001, 0.002, 0.004)
    muon_rates = (0.004, 0.008, 0.016)

    def build(self) -> nn.Module:
        """Two blocks."""
        return DigitsViT(layers=2)


class GAN(ModelTask):
    """Generates digits: a generator and a discriminator with an optimizer each (Goodfellow et al., arXiv:1406.2661).

    The discriminator's gradient at real digits is penalised (Mescheder et al., 2018, arXiv:1801.04406); without that
    no method learned anything in 800 steps. The loss in the table is the energy distance between generated and held-out
    digits (Székely and Rizzo, 2013): 0 where both come from one distribution.
    """

    length, batch_size, noise = 800, 32, 32
    adamw_rates = (0.001, 0.002, 0.004)
    muon_rates = (0.005, 0.01, 0.02)
    # Losses of one method differ by a third.
    seeds = range(6)
    optimizers_per_step = 2

    def __init__(self, optimizer: Callable[[Iterable[Any]], Optimizer], steps: int) -> None:
        super().__init__(optimizer, steps)
        self.automatic_optimization = False
        pixels, width = 64, 128
        self.generator = nn.Sequential(
            nn.Linear(self.noise, width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, pixels),
            nn.Sigmoid(),
        )
        self.discriminator = nn.Sequential(
            nn.Linear(pixels, width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, 1),
        )

    def data(self) -> DataLoader[Any]:
        """1437 digits."""
        return digits(self.batch_size).train_dataloader()

    def configure_optimizers(self) -> Any:
        """One for each of the two networks."""
        configs = [self.optimizer_with_schedule(network) for network in (self.generator, self.discriminator)]
        return [config["optimizer"] for config in configs], [config["lr_scheduler"] for config in configs]  # type: ignore[typeddict-item]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """A step of the discriminator, and one of the generator."""
        real = batch[0].flatten(1).requires_grad_()
        fake = self.generator(torch.randn(len(real), self.noise))
        of_generator, of_discriminator = self.optimizers()  # type: ignore[attr-defined]

        def descend(optimizer: Any, loss: Callable[[], Tensor]) -> None:
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss())
            optimizer.step()
            self.untoggle_optimizer(optimizer)

        descend(of_discriminator, lambda: self.discriminator_loss(real, fake.detach()))
        descend(of_generator, lambda: F.softplus(-self.discriminator(fake)).mean())
        for schedule in self.lr_schedulers():  # type: ignore[union-attr]
            schedule.step()  # type: ignore[union-attr, call-arg]

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """How badly real and generated digits are told apart, and the penalty."""
        logits = self.discriminator(real)
        (slope,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
        return (F.softplus(-logits) + F.softplus(self.discriminator(fake))).mean() + slope.square().sum(dim=1).mean()

    @torch.no_grad()
    def score(self, batches: int | None = None) -> Score:
        """Energy distance of 2000 generated digits to the held-out ones."""
        self.eval()
        held_out = islice(digits(self.batch_size).val_dataloader(), batches)
        real = torch.cat([images.flatten(1) for images, _ in held_out])
        fake = self.generator(torch.randn(2000, self.noise, generator=torch.Generator().manual_seed(0)))
        return Score(energy_distance(real, fake), float("nan"))


def energy_distance(x: Tensor, y: Tensor) -> float:
    """``2 E|x - y| - E|x - x'| - E|y - y'|`` of two samples, of shape (n, d) and (m, d).

    Example:
        >>> round(energy_distance(torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [4.0]])), 3)
        4.0
    """

    def within(z: Tensor) -> float:
        return float(torch.cdist(z, z).sum() / (len(z) * (len(z) - 1)))

    return float(2 * torch.cdist(x, y).mean()) - within(x) - within(y)
