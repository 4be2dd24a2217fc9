"""Data-parallel training that communicates only when the loss surface bends: ``Trainer(strategy="curvadion")``.

Importing the package registers the strategies. Lightning knows their names only from then on.
"""

from lightning.pytorch.strategies import StrategyRegistry

from .optim.curvadion import CurvaDion
from .optim.split_parameters import split_parameters
from .optim.sync_hook import watchers_without_hook
from .optim.triggers import CommunicationBudget, DriftThreshold, EveryNSteps, IntegratedRMMC, RMMCThreshold, Trigger
from .sync.lone_replicas import warn_if_apart
from .sync.process_group_sync import ProcessGroupSync
from .sync.quantization import register_wire_format
from .sync.wire_format import WireFormat
from .trainer.monitor import CommunicationMonitor
from .trainer.strategy import CurvaDionStrategy

CurvaDionStrategy.register_strategies(StrategyRegistry)
watchers_without_hook.append(warn_if_apart)

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
    "Trigger",
    "WireFormat",
    "register_wire_format",
    "split_parameters",
]
