"""A run loses a replica and is resumed from its last checkpoint, bit for bit.

python examples/resuming.py

Four runs, each in processes of its own:

1. Two replicas, undisturbed.
2. The same, until one replica is killed.
3. The second run resumed. It ends with the bits of the first.
4. The second run resumed on one replica.
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

EPOCHS, KILLED_IN_EPOCH, STEPS = 3, 1, 20


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
        """CurvaDion for every parameter."""
        return CurvaDion(split_parameters(self), lr=0.01)


class KillRank1(Callback):
    """Ends rank 1 as a lost machine would: without a message."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """In the middle of the second epoch."""
        if trainer.current_epoch == KILLED_IN_EPOCH and batch_idx == STEPS // 2 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, devices: int = 2, resume: Path | str | None = None, kill: bool = False) -> Classifier:
    """Train, with a checkpoint at the end of every epoch.

    Args:
        folder: Folder of the checkpoints.
        devices: Number of replicas.
        resume: Checkpoint to continue from, or ``"last"`` for the newest in the folder.
        kill: Whether rank 1 is killed in the second epoch.

    Returns:
        The trained module.
    """
    pl.seed_everything(0, verbose=False)
    x = torch.randn(32 * 2 * STEPS, 64)
    data = TensorDataset(x, (x @ torch.randn(64, 10)).argmax(dim=1))
    module = Classifier()
    trainer = pl.Trainer(
        # Forked replicas leave this process alive when one is killed. strategy="curvadion" resumes in the same way.
        strategy="curvadion_fork",
        accelerator="cpu",
        devices=devices,
        max_epochs=EPOCHS,
        callbacks=[ModelCheckpoint(folder, save_last=True), *([KillRank1()] if kill else [])],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=32, shuffle=True), ckpt_path=resume)
    print(f"  {saved_steps(folder)} steps, loss of the last epoch {trainer.callback_metrics['loss']:.4f}", flush=True)
    return module


def saved_steps(folder: Path) -> int:
    """Steps at which the folder's last checkpoint was written."""
    return torch.load(folder / "last.ckpt", weights_only=True)["global_step"]


def main() -> None:
    """Run all four."""
    # A forked process waits forever in OpenMP if its parent has used several threads.
    torch.set_num_threads(1)
    # Lightning's own messages would hide this script's.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    with TemporaryDirectory() as temporary:
        undisturbed_folder, killed_folder = Path(temporary, "undisturbed"), Path(temporary, "killed")
        print("1. Two replicas, undisturbed", flush=True)
        undisturbed = train(undisturbed_folder)
        print("2. Two replicas, one of which is killed", flush=True)
        try:
            train(killed_folder, kill=True)
        except ProcessException as error:
            print(f"  {error}", flush=True)
        print(f"  its last checkpoint: {saved_steps(killed_folder)} steps", flush=True)
        checkpoint = shutil.copy(killed_folder / "last.ckpt", Path(temporary, "killed.ckpt"))
        print('3. Resumed on two replicas: trainer.fit(..., ckpt_path="last")', flush=True)
        resumed = train(killed_folder, resume="last")
        same = all(map(torch.equal, undisturbed.parameters(), resumed.parameters()))
        print(f"  equal to the undisturbed run, bit for bit: {same}", flush=True)
        print("4. Resumed on one replica, from the consensus of the two", flush=True)
        train(Path(temporary, "one_replica"), devices=1, resume=checkpoint)


if __name__ == "__main__":
    main()
