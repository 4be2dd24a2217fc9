"""Data-parallel training that communicates only when the loss surface bends: ``Trainer(strategy="curvadion")``.

Importing the package registers the strategies.
"""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_curvadion.callbacks import CommunicationMonitor
from lightning_curvadion.optimizer import CurvaDion
from lightning_curvadion.parameters import split_parameters
from lightning_curvadion.strategy import CurvaDionStrategy
from lightning_curvadion.sync import ProcessGroupSync
from lightning_curvadion.triggers import CommunicationBudget, EveryNSteps, IntegratedRMMC, RMMCThreshold

CurvaDionStrategy.register_strategies(StrategyRegistry)

__all__ = [
    "CommunicationBudget",
    "CommunicationMonitor",
    "CurvaDion",
    "CurvaDionStrategy",
    "EveryNSteps",
    "IntegratedRMMC",
    "ProcessGroupSync",
    "RMMCThreshold",
    "split_parameters",
]
