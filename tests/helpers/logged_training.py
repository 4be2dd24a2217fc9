"""A short training with CurvaDion and one with DDP, both logged: what the report's tests read."""

import contextlib
import io
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from training import Module, trainer_for

from lightning_curvadion import CommunicationMonitor, CurvaDionStrategy

STEPS = 12
SYNC_STEPS = [2, 5, 8, 11]  # of EveryNSteps(3)


class LoggingModule(Module):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss


def train(rank, world, folder):
    """Train on a rank of the pool; logs go to ``folder/{curvadion,ddp}/{csv,tensorboard}``, what is printed beside."""
    for name, strategy in (("curvadion", CurvaDionStrategy()), ("ddp", DDPStrategy())):
        pl.seed_everything(0, verbose=False)
        trainer = trainer_for(
            rank,
            world,
            strategy,
            max_steps=STEPS,
            val_check_interval=4,
            log_every_n_steps=2,
            enable_checkpointing=True,
            callbacks=[CommunicationMonitor(), ModelCheckpoint(f"{folder}/{name}/checkpoints", every_n_train_steps=9)],
            logger=[CSVLogger(f"{folder}/{name}", "csv"), TensorBoardLogger(f"{folder}/{name}", "tensorboard")],
        )
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            trainer.fit(LoggingModule())
        if rank == 0:
            Path(folder, name, "printed").write_text(printed.getvalue())
