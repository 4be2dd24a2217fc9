"""Data-parallel training that communicates only when the loss surface bends: ``Trainer(strategy="curvadion")``."""

from lightning_curvadion.optimizer import CurvaDion
from lightning_curvadion.sync import ProcessGroupSync
from lightning_curvadion.triggers import CommunicationBudget, EveryNSteps, IntegratedRMMC, RMMCThreshold

