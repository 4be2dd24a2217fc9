"""A small vision transformer on scikit-learn's handwritten digits, 1797 images of 8 x 8 pixels.

python -m lightning_curvadion fit --config configs/digits_vit.yaml

The module has no ``configure_optimizers``. The config names optimizer and parameter groups instead.
"""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

try:
    from sklearn.datasets import load_digits
except ImportError as error:
    raise ImportError("examples/digits_vit.py needs scikit-learn: pip install scikit-learn") from error

SIDE, CLASSES = 8, 10
# Even: two replicas validate 180 images each, and the sampler repeats none.
VALIDATION = 360


class DigitsClassifier(pl.LightningModule):
    """Trains and validates a classifier of the digits: logits of shape (batch, 10) of images (batch, 1, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return and log the loss."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log loss and accuracy of the consensus over the images of all replicas."""
        images, labels = batch
        logits = self(images)
        self.accuracy(logits, labels)
        self.log("val_accuracy", self.accuracy, prog_bar=True)
        self.log("val_loss", F.cross_entropy(logits, labels), sync_dist=True)


class DigitsViT(DigitsClassifier):
    """Vision transformer (Dosovitskiy et al., 2020, arXiv:2010.11929) with a convolution stem (Xiao et al., 2021,
    arXiv:2106.14881).

    It has a parameter of each kind that ``split_parameters`` knows: matrices (linear layers), packed ones (attention),
    convolutions, norms, biases and an output head. The position embedding is none of these.

    Args:
        layers: Number of encoder blocks.
        width: Width of a token.
        heads: Number of attention heads.
        dropout: Dropout probability.

    Example:
        >>> DigitsViT(layers=1, width=16, heads=2)(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """

    def __init__(self, layers: int = 4, width: int = 64, heads: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width // 2, kernel_size=3, padding=1),
            nn.GELU(),
            nn.Conv2d(width // 2, width, kernel_size=2, stride=2),
        )
        self.positions = nn.Parameter(0.02 * torch.randn((SIDE // 2) ** 2, width))
        block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(block, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Map images of shape (batch, 1, 8, 8) to logits of shape (batch, 10)."""
        tokens = self.stem(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.encoder(tokens).mean(dim=1))


class Digits(pl.LightningDataModule):
    """The digits: 1437 to train, 360 to validate. The split is the same on all replicas.

    Args:
        batch_size: Images per replica and step.
    """

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Load and split the images."""
        digits = load_digits()
        images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
        data = TensorDataset(images, torch.from_numpy(digits.target).long())
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
        self.train, self.val = Subset(data, order[VALIDATION:]), Subset(data, order[:VALIDATION])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Training images, shuffled."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Validation images, in order."""
        return DataLoader(self.val, 60)
