"""Training runs that are cut in two, so that one version of the package can write what a later one reads.

    PYTHONPATH=OLD_CHECKOUT:tests/helpers python tests/helpers/earlier_version.py tests/data/version_0_1_0

writes what the package in OLD_CHECKOUT saves, and where it ends when it goes on itself. It uses public names alone.
"""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from failing import Module
from lightning.pytorch.callbacks import ModelCheckpoint
from models import build, parameters_of, train_step
from replicas import Replicas
from torch.utils.data import DataLoader
from training import trainer_for

from lightning_curvadion import CurvaDionStrategy, IntegratedRMMC

CUT, END = 4, 8
# The momentum and the format are defaults of that version.
TRAINER_OPTIONS = {"momentum": "local", "vector_format": "sign", "outer_momentum": 0.5, "residual_dtype": "bfloat16"}
LOOP_OPTIONS = {
    "wire_format": "int4",
    "vector_format": "int4",
    "momentum": "local",
    "outer_lr": 0.8,
    "outer_momentum": 0.5,
}


def fit(rank: int, world: int, steps: int, save_to: str | None = None, resume: str | None = None) -> list:
    """Train with a Trainer; the parameters at the end."""
    pl.seed_everything(0, verbose=False)
    module = Module()
    save = [ModelCheckpoint(save_to, "trainer", every_n_train_steps=CUT, save_top_k=-1)] if save_to else []
    trainer = trainer_for(
        rank,
        world,
        CurvaDionStrategy(**TRAINER_OPTIONS),
        max_steps=steps,
        callbacks=save,
        enable_checkpointing=bool(save),
    )
    trainer.fit(module, DataLoader(torch.zeros(1000), batch_size=1), ckpt_path=resume)
    assert trainer.global_step == steps
    return parameters_of(module)


def loop(rank: int, world: int, start: int, stop: int, save_to: str | None = None, resume: str | None = None) -> list:
    """Train in a plain loop, saving each rank's own state between two sync steps; the parameters at the end."""
    model, optimizer = build(hook=LOOP_OPTIONS, trigger=IntegratedRMMC(0.5))
    if resume:
        saved = torch.load(f"{resume}/loop_rank{rank}.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    for step in range(start, stop):
        train_step(model, optimizer, step, shard=rank)
    if save_to:
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(saved, f"{save_to}/loop_rank{rank}.pt")
    return parameters_of(model)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    pool = Replicas()
    try:
        pool.run(2, fit, CUT, str(folder))
        (folder / "trainer.ckpt").rename(folder / "trainer.pt")
        pool.run(2, loop, 0, CUT, str(folder))
        ends = {
            "trainer": pool.run(2, fit, END, None, str(folder / "trainer.pt"))[0],
            "loop": pool.run(2, loop, CUT, END, None, str(folder)),
        }
        torch.save(ends, folder / "ends.pt")
    finally:
        pool.close()


if __name__ == "__main__":
    main()
