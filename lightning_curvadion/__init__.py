"""Data-parallel training that communicates only when the loss surface bends: ``Trainer(strategy="curvadion")``.

Importing the package registers the strategies.
"""

from lightning.pytorch.strategies import StrategyRegistry

from .optim.curvadion import CurvaDion
from .optim.split_parameters import split_parameters
from .optim.triggers import CommunicationBudget, DriftThreshold, EveryNSteps, IntegratedRMMC, RMMCThreshold
from .sync.process_group_sync import ProcessGroupSync
from .trainer.monitor import CommunicationMonitor
from .trainer.strategy import CurvaDionStrategy

CurvaDionStrategy.register_strategies(StrategyRegistry)

__all__ = [
    "CommunicationBudget",
    "CommunicationMonitor",
    "CurvaDion",
    "CurvaDionStrategy",
    "DriftThreshold",
    "EveryNSteps",
    "IntegratedRMMC",
    "ProcessGroupSync",
    "RMMCThreshold",
    "split_parameters",
]
