"""Which runs the comparison is made of, stage by stage, and what of them is done."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from examples.benchmarks.compare_replica import Outcome, Run
from examples.benchmarks.methods import DEFAULT, METHODS, PERIODS

RESULTS = Path(__file__).parent / "results" / "compare.csv"

SEQUENCES, STEPS = 8, 1200
SEEDS = (0, 1, 2)
BATCHES = (4, 8, 16)
LENGTHS = (1.1, 1.25, 1.5)
# DDP is comfortable, spends half its step communicating, and nine tenths.
RATES = ("1gbit", "120mbit", "12mbit")

# Learning rates (of matrices, of everything else): AdamW has one, beside Dion and Muon it is the second that decides.
_ADAMW = ((0.0015, 0.0015), (0.003, 0.003), (0.006, 0.006))
_MATRICES = ((0.012, 0.006), (0.012, 0.012), (0.012, 0.024))
# Where the highest was best, one more.
_WIDER = (*_MATRICES[1:], (0.012, 0.048))
SWEEPS: dict[str, tuple[tuple[float, float], ...]] = {
    "DDP, AdamW": _ADAMW,
    "DDP, Dion": _WIDER,
    DEFAULT: _WIDER,
    "local SGD, H=30": _MATRICES,
    "DiLoCo, Dion, H=30": _MATRICES,
    "DDP, Muon": _MATRICES,
    "DiLoCo, AdamW, H=30": ((0.0007, 0.0007), *_ADAMW[:2]),
}
# With four replicas, where best rates may lie elsewhere; methods that are not here take those of two.
SWEEPS_OF_FOUR: dict[str, tuple[tuple[float, float], ...]] = {
    "DDP, Dion": ((0.012, 0.024), (0.012, 0.048), (0.024, 0.024)),
    DEFAULT: ((0.012, 0.024), (0.024, 0.048), (0.036, 0.048)),
}
# What the distance to DDP consists of.
BREAKDOWN = ("ours: every step, float32", "ours: every step, float32, momentum average", "ours: H=4, float32")
QUOTED = (
    "DDP, AdamW",
    "DDP, Muon",
    "DDP, Dion",
    "local SGD, H=10",
    "local SGD, H=30",
    "DiLoCo, Dion, H=30",
    "as published, tau=0.1",
    DEFAULT,
    "no communication",
)
BATCH_METHODS = ("DDP, AdamW", "DDP, Dion", "local SGD, H=30", DEFAULT, "no communication")
# The default trigger, and periods around its rate of synchronisation, everything else alike.
DISTURBED = (DEFAULT, *[f"ours: H={n}" for n in PERIODS[:2]])
TIMED = (*QUOTED, "DDP, PowerSGD", "Dion factors, rank 1/4, every step")
STAGES = (
    "sweep",
    "links",
    "seeds",
    "budgets",
    "lengths",
    "disturbed",
    "methods",
    "batches",
    "sweep of four",
    "replicas",
    "races",
)
RACERS = ("DDP, AdamW", "DDP, Dion", DEFAULT, "no communication")
# Steps of a timed run where a step takes long and where it does not.
FEW, MANY = 40, 250


@dataclass(frozen=True)
class Row:
    """A run that is done."""

    run: Run
    outcome: Outcome
    commit: str


def read(path: Path) -> list[Row]:
    """The rows of a CSV of ``compare_replica.py``, the newest of each run; none where there is no file."""
    if not path.exists():
        return []
    rows: dict[Run, Row] = {}
    with path.open(newline="") as file:
        for words in csv.DictReader(file):
            run = Run(**{field.name: field.type(words[field.name]) for field in fields(Run)})  # type: ignore[operator]
            outcome = Outcome(**{field.name: field.type(words[field.name]) for field in fields(Outcome)})  # type: ignore[operator]
            rows[run] = Row(run, outcome, words["commit"])
    return list(rows.values())


BASE = Run(method="", replicas=2, sequences=SEQUENCES, steps=STEPS, seed=0, lr=0.0, vector_lr=0.0)


def with_rates(run: Run, rates: tuple[float, float]) -> Run:
    """The run at these learning rates."""
    return replace(run, lr=rates[0], vector_lr=rates[1])


def swept(method: str, rows: Iterable[Row], replicas: int = 2) -> dict[tuple[float, float], float]:
    """Loss by learning rates, as far as the sweep of a method's family is done."""
    family = METHODS[method].sweep or method
    if replicas == 4 and family not in SWEEPS_OF_FOUR:
        replicas = 2
    sweep = SWEEPS_OF_FOUR[family] if replicas == 4 else SWEEPS[family]
    wanted = {with_rates(replace(BASE, method=family, replicas=replicas), rates): rates for rates in sweep}
    return {wanted[row.run]: row.outcome.val_loss for row in rows if row.run in wanted}


def best_rates(method: str, rows: Iterable[Row], replicas: int = 2) -> tuple[float, float]:
    """Learning rates with the lowest loss in the sweep of a method's family; the middle ones while none is done."""
    done = swept(method, rows, replicas)
    return min(done, key=done.__getitem__) if done else SWEEPS[METHODS[method].sweep or method][1]


def plan(stage: str, rows: list[Row]) -> list[Run]:
    """The runs of a stage, whether done or not."""

    def runs(methods: Iterable[str], **changes: object) -> list[Run]:
        like = replace(BASE, **changes)  # type: ignore[arg-type]
        return [with_rates(replace(like, method=name), best_rates(name, rows, like.replicas)) for name in methods]

    if stage == "sweep":
        return [with_rates(replace(BASE, method=name), rates) for name, sweep in SWEEPS.items() for rates in sweep]
    if stage == "methods":
        return runs(METHODS)
    if stage == "seeds":
        names = dict.fromkeys([*QUOTED, *DISTURBED])
        return [run for seed in SEEDS for run in runs(names, seed=seed)]
    if stage == "sweep of four":
        four = replace(BASE, replicas=4)
        return [with_rates(replace(four, method=name), r) for name, sweep in SWEEPS_OF_FOUR.items() for r in sweep]
    if stage == "replicas":
        return [*runs(QUOTED, replicas=4), *runs(BREAKDOWN, replicas=4)]
    if stage == "races":
        # Whole runs on the slowest link: DDP's, and one of ours that is long enough to pass it.
        return [
            run
            for name, length in (("DDP, Dion", 1.0), (DEFAULT, LENGTHS[1]))
            for run in runs([name], rate=RATES[-1], steps=round(length * STEPS))
        ]
    if stage == "batches":
        return [run for batch in BATCHES for run in runs(BATCH_METHODS, sequences=batch)]
    if stage == "budgets":
        return [run for seed in SEEDS for run in runs(["ours: budget 0.4"], seed=seed)]
    if stage == "lengths":
        return [
            run
            for seed in SEEDS
            for length in LENGTHS
            for run in runs([DEFAULT], seed=seed, steps=round(length * STEPS))
        ]
    if stage == "disturbed":
        return [
            run for seed in SEEDS for kind in ("lr", "data") for run in runs(DISTURBED, seed=seed, disturbance=kind)
        ]
    if stage == "links":
        once = [run for rate in ("", *RATES) for run in timed(runs(TIMED, rate=rate))]
        # At the slowest link again in turn, for medians; a seed more is another measurement.
        again = [run for seed in SEEDS[1:] for run in timed(runs(RACERS, rate=RATES[-1], seed=seed))]
        return once + again
    raise KeyError(stage)


def timed(runs: Iterable[Run]) -> list[Run]:
    """Shortened to what a time needs: few steps where every one syncs, more where the rate of syncs has to settle."""
    dense = [name for name, method in METHODS.items() if method.ddp or name.endswith("every step")]
    return [replace(run, stop=FEW if run.method in dense else MANY) for run in runs]
