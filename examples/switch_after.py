"""The switch from DDP, three lines: `diff examples/switch_before.py examples/switch_after.py` shows them.

python examples/switch_before.py
python examples/switch_after.py
"""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_curvadion import CurvaDion, split_parameters


class Classifier(pl.LightningModule):
    """Three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the accuracy over the data of both replicas."""
        self.accuracy(self.net(batch[0]), batch[1])
        self.log("val_accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer."""
        return CurvaDion(split_parameters(self), lr=0.003, lr_scale="match_rms_adamw")


if __name__ == "__main__":
    pl.seed_everything(0)
    x = torch.randn(2560, 64)
    data = TensorDataset(x, (x @ torch.randn(64, 10)).argmax(dim=1))
    train, val = torch.utils.data.random_split(data, [2048, 512])
    trainer = pl.Trainer(strategy="curvadion", accelerator="cpu", devices=2, max_epochs=3, logger=False)
    trainer.fit(Classifier(), DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=256))
    if trainer.is_global_zero:
        print(f"accuracy on data it has not seen: {trainer.callback_metrics['val_accuracy']:.3f}")
