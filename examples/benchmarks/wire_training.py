"""Which settings the wire formats are trained under, and the tables that come of it; ``wire.py --train`` runs them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from examples.benchmarks.replica_training import Setting, run

PERIODS = (3, 6, 12, 50)
RESULTS = Path(__file__).parent / "results" / "wire.csv"

EVERY_STEP = Setting({"momentum": "local", "wire_format": "float32"})

# How momentum meets, every six steps: format of the displacement, of the momentum, and rank of the factors that travel.
MOMENTUM: dict[str, dict[str, Any]] = {
    "local, float32": {"momentum": "local", "wire_format": "float32"},
    "local, int2": {"momentum": "local", "wire_format": "int2"},
    "factors, float32": {"momentum": "factors", "wire_format": "float32"},
    "factors, int2 and factors in float32": {"momentum": "factors", "wire_format": "int2", "factor_format": "float32"},
    "factors, int2 and factors in int8": {"momentum": "factors", "wire_format": "int2", "factor_format": "int8"},
    "factors, int2 and factors in int4": {"momentum": "factors", "wire_format": "int2", "factor_format": "int4"},
    "factors, int2 and factors in int2": {"momentum": "factors", "wire_format": "int2", "factor_format": "int2"},
    "factors, int2 and factors in sign": {"momentum": "factors", "wire_format": "int2", "factor_format": "sign"},
    "factors, int4 and factors in int4": {"momentum": "factors", "wire_format": "int4", "factor_format": "int4"},
    "half-rank factors, int2 and factors in int4": {
        "momentum": "factors", "wire_format": "int2", "factor_format": "int4", "sync_rank_fraction": 0.125,
    },
    "half-rank factors, int4 and factors in int4": {
        "momentum": "factors", "wire_format": "int4", "factor_format": "int4", "sync_rank_fraction": 0.125,
    },
    "average, float32": {"momentum": "average", "wire_format": "float32"},
    "average, int2 and momentum in int8": {"momentum": "average", "wire_format": "int2", "factor_format": "int8"},
    "average, int2 and momentum in int4": {"momentum": "average", "wire_format": "int2", "factor_format": "int4"},
    "average, int2 and momentum in int2": {"momentum": "average", "wire_format": "int2", "factor_format": "int2"},
}  # fmt: skip
MORE_SEEDS = (
    "local, float32",
    "local, int2",
    "factors, float32",
    "factors, int2 and factors in int4",
    "half-rank factors, int2 and factors in int4",
)
SEEDS = (0, 1, 2)


def settings() -> list[Setting]:
    """All runs, those first that others wait for."""
    by_momentum = [Setting(hook, 6) for hook in MOMENTUM.values()]
    by_format = [
        Setting({"momentum": "local", "wire_format": wire_format}, period, gated)
        for wire_format in ("int2", "sign", "int4", "float32", "int8", "bfloat16")
        for period in PERIODS
        for gated in (False, True)
    ]
    more = [Setting(MOMENTUM[name], 6, seed=seed) for seed in SEEDS[1:] for name in MORE_SEEDS]
    every_step = [replace(EVERY_STEP, seed=seed) for seed in SEEDS]
    everything = [EVERY_STEP, *by_momentum, *by_format, *more, *every_step]
    return list({setting.name: setting for setting in everything}.values())


def train(steps: int = 1500, replicas: int = 4) -> None:
    """Run what the CSV lacks."""
    run(settings(), replicas, steps, RESULTS)
