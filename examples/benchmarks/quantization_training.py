"""The training runs of ``quantization.py --train``, and their tables."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from examples.benchmarks.replica_training import Setting, on_replicas, read, train_missing
from examples.byte_gpt import StandardLibrary
from lightning_curvadion.sync.quantization import WIRE_FORMATS

PERIODS = (3, 6, 12, 50)
RESULTS = Path(__file__).parent / "results" / "wire.csv"

EVERY_STEP = Setting({"momentum": "local", "wire_format": "float32"})

# Ways to synchronise momentum every six steps: formats of displacement and momentum, and rank of the factors sent.
MOMENTUM: dict[str, dict[str, Any]] = {
    "local, float32": {"momentum": "local", "wire_format": "float32"},
    "local, int2": {"momentum": "local", "wire_format": "int2"},
    "factors, float32": {"momentum": "factors", "wire_format": "float32"},
    "factors, int2 and factors in float32": {"momentum": "factors", "wire_format": "int2", "factor_format": "float32"},
    "factors, int2 and factors in int8": {"momentum": "factors", "wire_format": "int2", "factor_format": "int8"},
    "factors, int2 and factors in int4": {"momentum": "factors", "wire_format": "int2", "factor_format": "int4"},
    "factors, int2 and factors in int2": {"momentum": "factors", "wire_format": "int2", "factor_format": "int2"},
    "factors, int2 and factors in sign": {"momentum": "factors", "wire_format": "int2", "factor_format": "sign"},
    "factors, sign and factors in int8": {"momentum": "factors", "wire_format": "sign", "factor_format": "int8"},
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
    "factors, float32",
    "factors, int2 and factors in int8",
    "factors, int2 and factors in int4",
    "factors, sign and factors in int8",
)
SEEDS = (0, 1, 2)


def settings() -> list[Setting]:
    """All runs. A periodic run comes before the triggered one that takes its budget."""
    by_momentum = [Setting(hook, 6) for hook in MOMENTUM.values()]
    by_format = {
        wire_format: [
            Setting({"momentum": "local", "wire_format": wire_format}, period, triggered)
            for period in PERIODS
            for triggered in (False, True)
        ]
        for wire_format in WIRE_FORMATS
    }
    more = [Setting(MOMENTUM[name], 6, seed=seed) for seed in SEEDS[1:] for name in MORE_SEEDS]
    everything = [EVERY_STEP, *by_momentum, *by_format["int2"], *by_format["sign"], *more]
    for wire_format in ("float32", "int4", "int8", "bfloat16"):
        everything += by_format[wire_format]
    everything += [replace(EVERY_STEP, seed=seed) for seed in SEEDS]
    return list({setting.name: setting for setting in everything}.values())


def train(steps: int = 1500, replicas: int = 4) -> None:
    """Train the runs that the CSV lacks."""
    StandardLibrary().prepare_data()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    on_replicas(replicas, train_missing, settings(), steps, RESULTS)


def smoke(csv_path: Path) -> None:
    """A few steps of a periodic and of a triggered run. Every replica calls it."""
    periodic = Setting(MOMENTUM["local, int2"], 3)
    train_missing([periodic, replace(periodic, triggered=True)], 9, csv_path, val_sequences=64)


def tables() -> None:
    """Print the CSV as Markdown tables."""
    rows = {row["setting"]: row for row in read(RESULTS)}

    def cell(setting: Setting) -> str:
        row = rows.get(setting.name)
        return f"{float(row['val_loss']):.3f} ({share(row):.1f} %)" if row else "not run"

    def share(row: dict[str, str]) -> float:
        return 100 * int(row["bytes_sent"]) / int(row["ddp_bytes"])

    print(f"\nEvery step in float32: {cell(EVERY_STEP)}\n\n| format | " + " | ".join(f"{p}" for p in PERIODS), end="")
    print(" | " + " | ".join(f"{p}, triggered" for p in PERIODS) + " |\n|" + " --- |" * (1 + 2 * len(PERIODS)))
    for wire_format in WIRE_FORMATS:
        hook = {"momentum": "local", "wire_format": wire_format}
        cells = [cell(Setting(hook, period, triggered)) for triggered in (False, True) for period in PERIODS]
        print(f"| {wire_format} | " + " | ".join(cells) + " |")

    print(
        "\n| momentum, every 6 steps | share of DDP | loss, seeds "
        + ", ".join(map(str, SEEDS))
        + " |\n| --- | --- | --- |"
    )
    for name, hook in [("local, float32, every step", EVERY_STEP.hook), *MOMENTUM.items()]:
        period = 1 if name.endswith("every step") else 6
        found = [rows[s.name] for s in (Setting(hook, period, seed=seed) for seed in SEEDS) if s.name in rows]
        if found:
            losses = " ".join(f"{float(row['val_loss']):.4f}" for row in found)
            print(f"| {name} | {share(found[0]):.2f} % | {losses} |")
