"""The registry of Trainer features, and one run of a feature on one rank."""

from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from models import parameters_of
from training import Module, fingerprint, trainer_for

from lightning_curvadion import CurvaDionStrategy

# By area and feature: the function that trains it, or the test that does, as pytest names it.
ROWS: dict[tuple[str, str], Callable[["Run"], None] | str] = {}


def feature(area: str, *names: str) -> Callable:
    """Register a function of a ``Run``, which has the name of the feature.

    It trains, and asserts what is special to the feature. ``test_features.py`` asserts what holds for all of them.
    """

    def register(function: Callable) -> Callable:
        for name in names:
            ROWS[area, name] = function
        return function

    return register


def tested_by(area: str, name: str, test: str) -> None:
    """Register a feature that another test covers."""
    ROWS[area, name] = test


class Run:
    """A feature under one strategy, on one rank."""

    def __init__(self, rank: int, world: int, strategy: str, name: str, folder: str) -> None:
        self.rank, self.world, self.strategy, self.name = rank, world, strategy, name
        self.folder = Path(folder) / strategy
        self.folder.mkdir(parents=True, exist_ok=True)
        self.trainers: list[pl.Trainer] = []
        self.modules: list[pl.LightningModule] = []
        pl.seed_everything(0, verbose=False)

    @property
    def under_curvadion(self) -> bool:
        return self.strategy == "curvadion"

    def trainer(self, **options) -> pl.Trainer:
        strategy = CurvaDionStrategy() if self.under_curvadion else DDPStrategy(find_unused_parameters=True)
        trainer = trainer_for(self.rank, self.world, strategy, **{"limit_val_batches": 4, **options})
        self.trainers.append(trainer)
        return trainer

    def fit(self, module: pl.LightningModule | None = None, data=None, **options) -> pl.Trainer:
        trainer = self.trainer(**options)
        module = module if module is not None else Module()
        self.modules.append(module)
        trainer.fit(module, data)
        return trainer

    def outcome(self) -> dict:
        """What must be equal across ranks and, apart from parameters, across strategies."""
        # Rank 0 may still remove a checkpoint.
        torch.distributed.barrier()
        return {
            "steps": [trainer.global_step for trainer in self.trainers],
            "epochs": [trainer.current_epoch for trainer in self.trainers],
            "metrics": [sorted(trainer.callback_metrics) for trainer in self.trainers],
            "files": sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*.ckpt")),
            "parameters": [fingerprint(parameters_of(module)) for module in self.modules],
            "validated": [fingerprint(seen) for module in self.modules for seen in getattr(module, "validated", [])],
        }
