"""Data-parallel training that communicates only when the loss surface bends: ``Trainer(strategy="curvadion")``.

Importing the package registers the strategies.
"""

from lightning.pytorch.strategies import StrategyRegistry

from .callbacks import CommunicationMonitor
from .optimizer import CurvaDion
from .parameters import split_parameters
from .strategy import CurvaDionStrategy
from .sync import ProcessGroupSync
from .triggers import CommunicationBudget, EveryNSteps, IntegratedRMMC, RMMCThreshold

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
