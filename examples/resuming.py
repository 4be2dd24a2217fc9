"""A run that loses a process, and is resumed from its last checkpoint as if nothing had happened.

python examples/resuming.py

Four runs, each in processes of its own: one that nothing disturbs; one of which a replica is killed; that one resumed,
which ends with the same bits as the first; and resumed once more on another number of replicas.
"""

import logging
import os
import shutil
import signal
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessException
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvadion import CurvaDion, split_parameters

EPOCHS, KILLED_IN, STEPS = 3, 1, 20


class Classifier(pl.LightningModule):
    """Three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss."""
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> CurvaDion:
        """What trains it."""
        return CurvaDion(split_parameters(self), lr=0.01)


class Kill(Callback):
    """Ends a replica as a lost machine would: without a word."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """In the middle of an epoch."""
        if trainer.current_epoch == KILLED_IN and batch_idx == STEPS // 2 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, devices: int = 2, resume: Path | str | None = None, kill: bool = False) -> Classifier:
    """Train, with a checkpoint at the end of every epoch.

    Args:
        folder: Of the checkpoints.
        devices: Replicas.
        resume: A checkpoint to go on from, or ``"last"`` for the folder's last one.
        kill: Whether a replica is lost on the way.

    Returns:
        The trained module.
    """
    pl.seed_everything(0, verbose=False)
    x = torch.randn(32 * 2 * STEPS, 64)
    data = TensorDataset(x, (x @ torch.randn(64, 10)).argmax(dim=1))
    module = Classifier()
    trainer = pl.Trainer(
        # Forked processes, so that this script can be there before and after them; "curvadion" resumes alike.
        strategy="curvadion_fork",
        accelerator="cpu",
        devices=devices,
        max_epochs=EPOCHS,
        callbacks=[ModelCheckpoint(folder, save_last=True), *([Kill()] if kill else [])],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=32, shuffle=True), ckpt_path=resume)
    print(f"  {steps(folder)} steps, loss of the last epoch {trainer.callback_metrics['loss']:.4f}", flush=True)
    return module


def steps(folder: Path) -> int:
    """After how many steps the folder's last checkpoint was written."""
    return torch.load(folder / "last.ckpt", weights_only=True)["global_step"]


def main() -> None:
    """The four runs, and what they came to."""
    # What a Trainer says at every start would hide what this script says.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    with TemporaryDirectory() as temporary:
        whole, broken = Path(temporary, "whole"), Path(temporary, "broken")
        print("1. Two replicas, undisturbed", flush=True)
        undisturbed = train(whole)
        print("2. The same, and one of them is killed", flush=True)
        try:
            train(broken, kill=True)
        except ProcessException as error:
            print(f"  {error}", flush=True)
        print(f"  what is left: a checkpoint of {steps(broken)} steps", flush=True)
        left = shutil.copy(broken / "last.ckpt", Path(temporary, "left.ckpt"))
        print('3. Resumed on two replicas: trainer.fit(..., ckpt_path="last")', flush=True)
        resumed = train(broken, resume="last")
        same = all(map(torch.equal, undisturbed.parameters(), resumed.parameters()))
        print(f"  the parameters of the undisturbed run, bit for bit: {same}", flush=True)
        print("4. Resumed on one replica, which starts from the consensus of the two", flush=True)
        train(Path(temporary, "alone"), devices=1, resume=left)


if __name__ == "__main__":
    main()
