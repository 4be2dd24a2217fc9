"""The runs of the comparison, stage by stage, and the rows of those that are done."""

import csv
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from examples.benchmarks.compare_replica import Outcome, Run
from examples.benchmarks.methods import DEFAULT, FULL_RANK, METHODS, PERIODS

RESULTS = Path(__file__).parent / "results" / "compare.csv"

SEQUENCES, STEPS = 8, 1200
SEEDS = (0, 1, 2)
BATCHES = (4, 8, 16)
LENGTHS = (1.1, 1.25, 1.5)
# On these links DDP spends little, half and nine tenths of its step communicating.
RATES = ("1gbit", "120mbit", "12mbit")

# Learning rates of (matrices, everything else). AdamW has one rate. With Dion and Muon the second rate matters most.
_ADAMW = ((0.0015, 0.0015), (0.003, 0.003), (0.006, 0.006))
_MATRICES = ((0.012, 0.006), (0.012, 0.012), (0.012, 0.024))
# The highest rate was best, so one more.
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
# For four replicas. Other methods take their rates of two replicas.
SWEEPS_OF_FOUR: dict[str, tuple[tuple[float, float], ...]] = {
    "DDP, Dion": ((0.012, 0.024), (0.012, 0.048), (0.024, 0.024)),
    DEFAULT: ((0.012, 0.024), (0.024, 0.048), (0.036, 0.048)),
}
# The parts of the distance to DDP.
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
# Steps of full rank, with embeddings and head in formats of their own, and with a sync spread over several steps.
FULL_RANKS = tuple(name for name in METHODS if name.startswith(FULL_RANK))
BATCH_METHODS = ("DDP, AdamW", "DDP, Dion", "local SGD, H=30", DEFAULT, "no communication")
# The default trigger, and periods that synchronise about as often. Everything else is equal.
DISTURBED = (DEFAULT, *[f"ours: H={n}" for n in PERIODS[:2]])
TIMED = (*QUOTED, "DDP, PowerSGD", "Dion factors, rank 1/4, every step")
RACERS = ("DDP, AdamW", "DDP, Dion", DEFAULT, "no communication")
# Steps of a timed run: few if every step synchronises, more if the sync rate must settle.
FEW, MANY = 40, 250


@dataclass(frozen=True)
class Row:
    """A finished run."""

    run: Run
    outcome: Outcome
    commit: str


def read(path: Path) -> list[Row]:
    """Rows of a CSV of ``compare_replica.py``, the newest of each run. Empty if there is no file."""
    if not path.exists():
        return []
    rows: dict[Run, Row] = {}
    with path.open(newline="") as file:
        for cells in csv.DictReader(file):
            run = Run(**{field.name: field.type(cells[field.name]) for field in fields(Run)})  # type: ignore[operator]
            outcome = Outcome(**{field.name: field.type(cells[field.name]) for field in fields(Outcome)})  # type: ignore[operator]
            rows[run] = Row(run, outcome, cells["commit"])
    return list(rows.values())


BASE = Run(method="", replicas=2, sequences=SEQUENCES, steps=STEPS, seed=0, lr=0.0, vector_lr=0.0)


def with_rates(run: Run, rates: tuple[float, float]) -> Run:
    """The run with these learning rates."""
    return replace(run, lr=rates[0], vector_lr=rates[1])


def swept(method: str, rows: Iterable[Row], replicas: int = 2) -> dict[tuple[float, float], float]:
    """Loss by learning rates: the finished part of the sweep that the method uses."""
    family = METHODS[method].sweep or method
    if replicas == 4 and family not in SWEEPS_OF_FOUR:
        replicas = 2
    sweep = SWEEPS_OF_FOUR[family] if replicas == 4 else SWEEPS[family]
    wanted = {with_rates(replace(BASE, method=family, replicas=replicas), rates): rates for rates in sweep}
    return {wanted[row.run]: row.outcome.val_loss for row in rows if row.run in wanted}


def best_rates(method: str, rows: Iterable[Row], replicas: int = 2) -> tuple[float, float]:
    """Learning rates with the lowest loss in the sweep that the method uses; the middle ones before any run."""
    done = swept(method, rows, replicas)
    return min(done, key=done.__getitem__) if done else SWEEPS[METHODS[method].sweep or method][1]


def tuned(methods: Iterable[str], rows: list[Row], **changes: object) -> list[Run]:
    """Runs at the base settings with some changes, each method at its best learning rates."""
    base = replace(BASE, **changes)  # type: ignore[arg-type]
    return [with_rates(replace(base, method=name), best_rates(name, rows, base.replicas)) for name in methods]


def sweep(sweeps: Mapping[str, tuple[tuple[float, float], ...]], replicas: int) -> list[Run]:
    """Every method of a sweep at all its learning rates."""
    base = replace(BASE, replicas=replicas)
    return [with_rates(replace(base, method=name), rates) for name, pairs in sweeps.items() for rates in pairs]


def links(rows: list[Row]) -> list[Run]:
    """Timed runs on every link, and more on the slowest for medians: another seed is another measurement."""
    once = [run for rate in ("", *RATES) for run in timed(tuned(TIMED, rows, rate=rate))]
    return once + [run for seed in SEEDS[1:] for run in timed(tuned(RACERS, rows, rate=RATES[-1], seed=seed))]


def timed(runs: Iterable[Run]) -> list[Run]:
    """The runs, shortened to what a time needs."""
    dense = [name for name, method in METHODS.items() if method.ddp or name.endswith("every step")]
    return [replace(run, stop=FEW if run.method in dense else MANY) for run in runs]


def disturbed(rows: list[Row]) -> list[Run]:
    """Triggers, with a change in the middle of the run."""
    return [
        run for seed in SEEDS for kind in ("lr", "data") for run in tuned(DISTURBED, rows, seed=seed, disturbance=kind)
    ]


def lengths(rows: list[Row]) -> list[Run]:
    """Longer runs of the defaults."""
    steps = [round(length * STEPS) for length in LENGTHS]
    return [run for seed in SEEDS for count in steps for run in tuned([DEFAULT], rows, seed=seed, steps=count)]


def races(rows: list[Row]) -> list[Run]:
    """Whole runs on the slowest link: DDP's, and a run of the defaults that is long enough to pass it."""
    steps = round(LENGTHS[1] * STEPS)
    return tuned(["DDP, Dion"], rows, rate=RATES[-1]) + tuned([DEFAULT], rows, rate=RATES[-1], steps=steps)


PLANS: dict[str, Callable[[list[Row]], list[Run]]] = {
    "sweep": lambda rows: sweep(SWEEPS, replicas=2),
    "links": links,
    "seeds": lambda rows: [
        run for seed in SEEDS for run in tuned(dict.fromkeys([*QUOTED, *DISTURBED]), rows, seed=seed)
    ],
    "budgets": lambda rows: [run for seed in SEEDS for run in tuned(["ours: budget 0.4"], rows, seed=seed)],
    "lengths": lengths,
    "disturbed": disturbed,
    "methods": lambda rows: tuned(METHODS, rows),
    "batches": lambda rows: [run for batch in BATCHES for run in tuned(BATCH_METHODS, rows, sequences=batch)],
    "sweep of four": lambda rows: sweep(SWEEPS_OF_FOUR, replicas=4),
    "full rank": lambda rows: [run for seed in SEEDS for run in tuned(FULL_RANKS, rows, seed=seed)],
    "full rank of four": lambda rows: tuned([FULL_RANK, f"{FULL_RANK}, int4 for the rest"], rows, replicas=4),
    "replicas": lambda rows: tuned([*QUOTED, *BREAKDOWN], rows, replicas=4),
    "races": races,
}
STAGES = tuple(PLANS)


def plan(stage: str, rows: list[Row]) -> list[Run]:
    """The runs of a stage, whether done or not. ``rows`` decide the learning rates."""
    return PLANS[stage](rows)
