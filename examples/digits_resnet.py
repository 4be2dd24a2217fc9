"""A small residual network on scikit-learn's handwritten digits.

python -m lightning_curvadion fit --config configs/resnet.yaml

The module has no ``configure_optimizers``. The config names optimizer and parameter groups instead.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from examples.digits_vit import CLASSES, DigitsClassifier


class Residual(nn.Module):
    """Two convolutions with batch norm, and a shortcut around them (He et al., 2016, arXiv:1512.03385)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out))
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, side, side) to (batch, out, side / stride, side / stride)."""
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


def resnet(width: int) -> nn.Sequential:
    """A ResNet of eight convolutions, in three stages of ``width``, twice and four times as many channels."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        Residual(width, width, 1),
        Residual(width, 2 * width, 2),
        Residual(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, CLASSES),
    )


class DigitsResNet(DigitsClassifier):
    """Trains :func:`resnet`.

    Args:
        width: Channels of the first stage.

    Example:
        >>> import torch
        >>> DigitsResNet(width=4)(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.net = resnet(width)

    def forward(self, images: Tensor) -> Tensor:
        """Map images of shape (batch, 1, 8, 8) to logits of shape (batch, 10)."""
        return self.net(images)
