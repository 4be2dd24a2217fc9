"""RMMC as a metric: of all momenta, of each parameter group and of each layer."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from ..optim.curvadion import CurvaDion
from ..optim.step_signal import FIRST_MOMENTS
from .run_metric import Event, RunMetric, register_metric


@register_metric
class RMMC(RunMetric):
    """The largest Relative Maximum Momentum Change since the last reset, of all momenta and of each group.

    First steps, whose change counts as infinite, are left out.

    Args:
        groups: Names of the groups, such as parameter groups or layers.
        **options: Of ``torchmetrics.Metric``.

    Example:
        >>> rmmc = RMMC(groups=["attention", "mlp"])
        >>> rmmc.update(0.30, {"attention": 0.10, "mlp": 0.30})
        >>> rmmc.update(0.20, {"attention": 0.20, "mlp": 0.05})
        >>> {name: round(value.item(), 2) for name, value in rmmc.compute().items()}
        {'max': 0.3, 'attention': 0.2, 'mlp': 0.3}
    """

    name = "rmmc"
    rows: ClassVar = {"rmmc": None}
    largest: Tensor

    def __init__(self, groups: Sequence[str] = (), **options: Any) -> None:
        super().__init__(**options)
        self.groups = tuple(groups)
        self._optimizers: dict[CurvaDion, None] = {}
        self.add_state("largest", torch.zeros(1 + len(self.groups)), dist_reduce_fx="max")

    def update(self, rmmc: float, by_group: Mapping[str, float] | None = None) -> None:
        """Add a step.

        Args:
            rmmc: Of all momenta, ``optimizer.last_step.rmmc``.
            by_group: Of each group; a missing one had nothing to train.
        """
        by_group = by_group or {}
        values = [rmmc, *(by_group.get(name, 0.0) for name in self.groups)]
        finite = torch.tensor([value if math.isfinite(value) else 0.0 for value in values])
        self.largest = torch.maximum(self.largest, finite.to(self.largest))

    def compute(self) -> dict[str, Tensor]:
        """The largest of all under ``"max"``, and that of each group under its name."""
        return dict(zip(("max", *self.groups), self.largest.unbind(), strict=True))

    @override
    def observe(self, event: Event) -> None:
        if isinstance(event.optimizer, CurvaDion):
            self._optimizers[event.optimizer] = None

    @override
    def values(self) -> dict[str, float]:
        steps = [optimizer.last_step for optimizer in self._optimizers if optimizer.last_step is not None]
        if not steps:
            return {}
        values = {"rmmc": max(step.rmmc for step in steps)}
        for optimizer in self._optimizers:
            values.update(rmmc_by_group(optimizer))
        return values

    @override
    def totals(self) -> dict[str, float]:
        return {}


def rmmc_by_group(optimizer: CurvaDion) -> dict[str, float]:
    """RMMC of the last step by parameter group and by layer, on this replica.

    Args:
        optimizer: It has stepped.

    Returns:
        ``rmmc_group/<name>`` and ``rmmc_layer/<layer>``; a layer is a parameter's name up to its last number, such as
        ``gpt.blocks.3``, or the module that holds the parameter. AdamW and Lion groups are together one group and one
        layer, ``first_moments``, since RMMC counts them as one.

    Example:
        >>> rmmc_by_group(CurvaDion([torch.nn.Parameter(torch.ones(2, 2))]))
        {}
    """
    changes = optimizer.rmmc_by_parameter()
    name_of = {parameter: name for name, parameter in optimizer.named_parameters()}
    members = {FIRST_MOMENTS: _tag(f"rmmc_group/{FIRST_MOMENTS}")}
    for number, group in enumerate(optimizer.param_groups):
        of_group = _tag(f"rmmc_group/{group.get('name', number)}")
        members.update({name_of[p]: of_group for p in group["params"] if name_of[p] in changes})
    layers = {name: _tag(f"rmmc_layer/{_layer(name)}") for name in changes}
    groups = dict.fromkeys(members[name] for name in changes)
    metric = RMMC([*groups, *dict.fromkeys(layers.values())], sync_on_compute=False)
    for name, change in changes.items():
        metric.update(change, {members[name]: change, layers[name]: change})
    return {name: float(value) for name, value in metric.compute().items() if name != "max"} if changes else {}


def _layer(parameter_name: str) -> str:
    numbered = re.match(r"(.*\.\d+)\.", f"{parameter_name}.")
    return numbered[1] if numbered else parameter_name.rpartition(".")[0] or parameter_name


def _tag(name: str) -> str:
    """A log key: some loggers refuse spaces."""
    return re.sub(r"\s+", "_", name)
