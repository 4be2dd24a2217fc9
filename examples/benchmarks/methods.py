"""The methods of the comparison: which optimizer, which communication, and when."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Muon, Optimizer

from examples.benchmarks.authors_code import AuthorsCurvaDion
from lightning_curvadion import (
    CommunicationBudget,
    CurvaDion,
    CurvaDionStrategy,
    DriftThreshold,
    EveryNSteps,
    IntegratedRMMC,
    RMMCThreshold,
)
from lightning_curvadion.optim.triggers import Trigger
from lightning_curvadion.trainer.lightning_internals import disable_sigterm_broadcast

BETAS, WEIGHT_DECAY = (0.9, 0.95), 0.01
Group = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """One way to train on several replicas.

    Attributes:
        inner: The optimizer: ``"dion"``, ``"adamw"`` or ``"muon"``. Dion and Muon take the matrices, AdamW the rest.
            Without DDP, and with Dion, it is a CurvaDion that takes these steps.
        ddp: Whether DistributedDataParallel averages the gradients at every step.
        trigger: When replicas synchronise without DDP. ``None`` is the default trigger.
        hook: Arguments of ``CurvaDionStrategy``.
        options: Arguments of ``CurvaDion``.
        alone: Whether the strategy never communicates, not even the RMMC.
        authors: Whether Dion is ``AuthorsCurvaDion``, which communicates by itself.
        power_sgd: Whether DDP's gradients go through torch's ``powerSGD_hook``.
        sweep: Name of the method whose learning-rate sweep this one uses.
    """

    inner: str = "dion"
    ddp: bool = False
    trigger: Trigger | None = None
    hook: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    alone: bool = False
    authors: bool = False
    power_sgd: bool = False
    sweep: str = ""

    def optimizer(self, groups: Iterable[Group], lr: float, vector_lr: float) -> Optimizer:
        """An optimizer for the groups of ``split_parameters``."""
        groups = list(groups)
        matrices = [group for group in groups if group["algorithm"] == "dion"]
        for group in groups:
            group["lr"] = lr if group["algorithm"] == "dion" else vector_lr
        if self.inner == "muon" and self.ddp:
            rest = [group for group in groups if group["algorithm"] != "dion"]
            muon = Muon(_plain(matrices), lr=lr, weight_decay=WEIGHT_DECAY)
            return OptimizerPair(muon, AdamW(_plain(rest), lr=vector_lr, betas=BETAS, weight_decay=WEIGHT_DECAY))
        if self.inner == "adamw" and self.ddp:
            return AdamW(_plain(groups), lr=lr, betas=BETAS, weight_decay=WEIGHT_DECAY)
        if self.inner == "adamw":
            for group in matrices:
                group["algorithm"] = "adamw"
        options = {"local_update": "dion" if self.inner == "dion" else "muon", **self.options}
        curvadion = AuthorsCurvaDion if self.authors else CurvaDion
        return curvadion(groups, lr=lr, betas=BETAS, weight_decay=WEIGHT_DECAY, trigger=self.trigger, **options)

    def strategy(self) -> Strategy:
        """A new strategy for a Trainer."""
        if self.alone:
            return NoCommunication()
        return DDPStrategy() if self.ddp else CurvaDionStrategy(**self.hook)

    def callbacks(self) -> list[pl.Callback]:
        """Callbacks that the method needs."""
        return [PowerSGD()] if self.power_sgd else []


def _plain(groups: list[Group]) -> list[Group]:
    """Groups in the form of ``torch.optim``."""
    return [{"params": group["params"], "lr": group["lr"]} for group in groups]


class OptimizerPair(Optimizer):
    """Two optimizers as one: Lightning's automatic optimization takes one."""

    def __init__(self, first: Optimizer, second: Optimizer) -> None:
        groups = [*first.param_groups, *second.param_groups]
        super().__init__([parameter for group in groups for parameter in group["params"]], {})
        self.parts = (first, second)
        # The same group objects, so that a schedule changes both optimizers.
        self.param_groups = groups

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """Step both optimizers."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


class NoCommunication(DDPStrategy):
    """Processes as under DDP, each with its shard of the data, but without communication of the strategy."""

    def setup(self, trainer: pl.Trainer) -> None:
        """Keep Lightning from telling all replicas of a SIGTERM, a broadcast at every step."""
        super().setup(trainer)
        disable_sigterm_broadcast(trainer)

    def configure_ddp(self) -> None:
        """Do not wrap the module, so that nothing is reduced."""


class PowerSGD(pl.Callback):
    """Registers torch's hook on the DDP module itself: Lightning registers hooks on CUDA only.

    Rank 4 from step 10 on, with error feedback.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Register the hook before the first backward pass."""
        state = powerSGD_hook.PowerSGDState(
            process_group=None, matrix_approximation_rank=4, start_powerSGD_iter=10, min_compression_rate=2
        )
        cast(DistributedDataParallel, trainer.strategy.model).register_comm_hook(state, powerSGD_hook.powerSGD_hook)


# As in the literature: parameters at full width, no momentum.
PLAIN: dict[str, Any] = {"momentum": "local", "wire_format": "float32"}
OUTER = {"outer_lr": 0.7, "outer_momentum": 0.9}
# Muon and Dion as inner optimizers need less outer momentum than AdamW (MuLoCo, arXiv:2505.23725).
OUTER_DION = {"outer_lr": 0.7, "outer_momentum": 0.6}
DEFAULT, HALF_RANK, FULL_RANK = "ours: defaults", "ours at half rank", "ours at full rank"
PERIODS = (5, 6)
# How many steps late agreements are read and means are taken over.
DELAYS = ((0, 0), (1, 0), (1, 1), (1, 2), (5, 3), (5, 5), (6, 8))
OLD_BUDGET = 0.3


def _ddp(inner: str, **other: Any) -> Method:
    return Method(inner, ddp=True, **other)


def _every(n: int, inner: str = "dion", sweep: str = "local SGD, H=30", **hook: Any) -> Method:
    """Local SGD (Stich, 2019, arXiv:1805.09767), or DiLoCo (arXiv:2311.08105) with an outer step in ``hook``."""
    return Method(inner, trigger=EveryNSteps(n), hook={**PLAIN, **hook}, options={"max_local_steps": None}, sweep=sweep)


def _diloco(n: int, inner: str, **hook: Any) -> Method:
    outer = OUTER if inner == "adamw" else OUTER_DION
    names = {"adamw": "AdamW", "dion": "Dion", "muon": "Muon"}
    return _every(n, inner, f"DiLoCo, {names[inner]}, H=30", **outer, **hook)


def _published(tau: float, **options: Any) -> Method:
    """CurvaDion as its paper has it: factors and the mean gradient of the AdamW groups, without consensus."""
    options = {"max_local_steps": None, **options}
    return Method(trigger=RMMCThreshold(tau), hook={"consensus": "none"}, options=options, sweep="local SGD, H=30")


def _authors(tau: float) -> Method:
    """CurvaDion as the public code of its authors means it: at sync steps all replicas take the mean gradient."""
    options = {"max_local_steps": None, "rank_fraction": 0.5}
    return Method(trigger=RMMCThreshold(tau), options=options, alone=True, authors=True, sweep="local SGD, H=30")


def _curvadion(trigger: Trigger | None = None, **hook: Any) -> Method:
    """CurvaDion with its defaults, but for the arguments."""
    return Method("muon", trigger=trigger, hook=hook, sweep=DEFAULT)


def _of_rank(rank_fraction: float, trigger: Trigger | None = None, **hook: Any) -> Method:
    """CurvaDion as its defaults were before Muon's step and momentum correction, but for the arguments."""
    trigger, hook = trigger or IntegratedRMMC(OLD_BUDGET), {"momentum": "local", **hook}
    return Method(trigger=trigger, hook=hook, options={"rank_fraction": rank_fraction}, sweep=HALF_RANK)


def _half_rank(trigger: Trigger | None = None, **hook: Any) -> Method:
    return _of_rank(0.5, trigger, **hook)


def _full_rank(trigger: Trigger | None = None, **hook: Any) -> Method:
    return _of_rank(1.0, trigger, **hook)


def _thin(rank_fraction: float) -> dict[str, Any]:
    """Momentum through a few common columns in 4 bits."""
    return {"momentum": "factors", "factor_format": "int4", "sync_rank_fraction": rank_fraction}


METHODS: dict[str, Method] = {
    "DDP, AdamW": _ddp("adamw"),
    "DDP, Muon": _ddp("muon"),
    "DDP, Dion": _ddp("dion"),
    "DDP, Dion, full rank": _ddp("dion", options={"rank_fraction": 1.0}, sweep="DDP, Dion"),
    "DDP, Dion, rank 1/4": _ddp("dion", options={"rank_fraction": 0.25}, sweep="DDP, Dion"),
    "DDP, PowerSGD": _ddp("adamw", power_sgd=True, sweep="DDP, AdamW"),
    "Dion factors, rank 1/4, every step": Method(
        trigger=EveryNSteps(1), hook={"consensus": "none"}, options={"rank_fraction": 0.25}, sweep="DDP, Dion"
    ),
    **{f"local SGD, H={n}": _every(n) for n in (10, 30, 100)},
    **{f"local SGD, H={n}, sign": _every(n, wire_format="sign") for n in (10, 30)},
    **{f"DiLoCo, AdamW, H={n}": _diloco(n, "adamw") for n in (10, 30, 100)},
    **{f"DiLoCo, Dion, H={n}": _diloco(n, "dion") for n in (10, 30, 100)},
    "DiLoCo, Dion, H=10, sign": _diloco(10, "dion", wire_format="sign"),
    **{f"DiLoCo, Muon, H={n}": _diloco(n, "muon") for n in (10, 30, 100)},
    **{f"as published, tau={tau}": _published(tau) for tau in (0.05, 0.1)},
    "as published, tau=0.1, sgd": _published(0.1, local_update="sgd", local_lr=0.1),
    "authors' code, tau=0.1": _authors(0.1),
    "no communication": Method(alone=True, sweep="local SGD, H=30"),
    # The steps of the defaults, which on a CPU take longer than Dion's.
    "no communication, Muon": Method("muon", alone=True, sweep=DEFAULT),
    DEFAULT: _curvadion(),
    **{f"ours: H={n}": _curvadion(EveryNSteps(n)) for n in PERIODS},
    "ours: drift 0.028": _curvadion(DriftThreshold(0.028)),
    **{f"ours: budget {budget}": _curvadion(IntegratedRMMC(budget)) for budget in (0.3, 0.6)},
    **{f"ours: {name}": _curvadion(wire_format=name) for name in ("float32", "int2")},
    "ours: int4 for the rest": _curvadion(vector_format="int4"),
    "ours: int2, int4 for the rest, budget 0.6": _curvadion(
        IntegratedRMMC(0.6), wire_format="int2", vector_format="int4"
    ),
    **{f"ours: lag {lag}, overlap {overlap}": _curvadion(lag=lag, overlap=overlap) for lag, overlap in DELAYS},
    "ours: spread 4, budget 0.15": _curvadion(IntegratedRMMC(0.15), spread=4),
    # What a sync step does to the momentum.
    "ours: momentum local": _curvadion(momentum="local"),
    "ours: momentum local, budget 0.3": _curvadion(IntegratedRMMC(0.3), momentum="local"),
    "ours: momentum in thin factors 1/16": _curvadion(**_thin(1 / 16)),
    "ours: momentum average in int8": _curvadion(momentum="average", factor_format="int8"),
    **{
        f"ours: H=5, float32, momentum {momentum}": _curvadion(
            EveryNSteps(5), wire_format="float32", momentum=momentum, factor_format="float32"
        )
        for momentum in ("displacement", "average", "local")
    },
    # Before Muon's step was the default: with Dion's at half rank, which decided formats, momentum and outer step.
    HALF_RANK: _half_rank(),
    **{f"{HALF_RANK}: H={n}": _half_rank(EveryNSteps(n)) for n in PERIODS},
    **{f"{HALF_RANK}: budget {budget}": _half_rank(IntegratedRMMC(budget)) for budget in (0.2, 0.4, 0.8)},
    f"{HALF_RANK}: tau=0.07": _half_rank(RMMCThreshold(0.07)),
    f"{HALF_RANK}: 15 % of steps": _half_rank(CommunicationBudget(0.15)),
    **{f"{HALF_RANK}: {name}": _half_rank(wire_format=name) for name in ("float32", "int8", "int4", "int2")},
    f"{HALF_RANK}: every step, float32": _half_rank(EveryNSteps(1), wire_format="float32"),
    f"{HALF_RANK}: every step, float32, momentum average": _half_rank(
        EveryNSteps(1), wire_format="float32", momentum="average", factor_format="float32"
    ),
    f"{HALF_RANK}: H=4, float32": _half_rank(EveryNSteps(4), wire_format="float32"),
    # As many bytes as a budget of 0.3, in fewer syncs with factors.
    f"{HALF_RANK}: thin factors 1/16, budget 0.37": _half_rank(IntegratedRMMC(0.37), **_thin(1 / 16)),
    f"{HALF_RANK}: thin factors 1/8, budget 0.44": _half_rank(IntegratedRMMC(0.44), **_thin(1 / 8)),
    f"{HALF_RANK}: thin factors 1/8": _half_rank(**_thin(1 / 8)),
    f"{HALF_RANK}: int2, momentum factors": _half_rank(wire_format="int2", momentum="factors"),
    f"{HALF_RANK}: momentum average in int4": _half_rank(momentum="average", factor_format="int4"),
    f"{HALF_RANK}: momentum dion": _half_rank(momentum="dion"),
    f"{HALF_RANK}: momentum displacement": _half_rank(momentum="displacement"),
    f"{HALF_RANK}: consensus factors": _half_rank(consensus="factors", momentum="factors", factor_format="int4"),
    f"{HALF_RANK}: outer 0.8, 0.5": _half_rank(outer_lr=0.8, outer_momentum=0.5),
    f"{HALF_RANK}: budget 0.8, outer 0.7, 0.6": _half_rank(IntegratedRMMC(0.8), **OUTER_DION),
    f"{HALF_RANK}: outer 1.0, 0.3": _half_rank(outer_lr=1.0, outer_momentum=0.3),
    FULL_RANK: _full_rank(),
    **{
        f"{FULL_RANK}: {vectors} for the rest": _full_rank(vector_format=vectors)
        for vectors in ("int2", "int4", "int8")
    },
    f"{FULL_RANK}: int4 for the rest, budget 0.4": _full_rank(IntegratedRMMC(0.4), vector_format="int4"),
    **{
        f"{FULL_RANK}: {name}budget {budget}, spread {spread}": _full_rank(
            IntegratedRMMC(budget), vector_format=vectors, spread=spread
        )
        for name, vectors in (("", None), ("int4 for the rest, ", "int4"))
        for budget, spread in ((0.15, 2), (0.1, 4))
    },
    f"{FULL_RANK}: int4 for the rest, thin factors 1/16": _full_rank(vector_format="int4", **_thin(1 / 16)),
    f"{FULL_RANK}: int4 for the rest, momentum average in int4": _full_rank(
        vector_format="int4", momentum="average", factor_format="int4"
    ),
    "ours at rank 1/4": _of_rank(0.25),
    "ours at rank 1/4: momentum factors": _of_rank(0.25, momentum="factors"),
}
