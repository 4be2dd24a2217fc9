"""The runs of the comparison, stage by stage, and the rows of those that are done."""

import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from examples.benchmarks.compare_replica import Outcome, Run
from examples.benchmarks.methods import DEFAULT, HALF_RANK, METHODS, PERIODS

RESULTS = Path(__file__).parent / "results" / "compare.csv"

SEQUENCES, STEPS = 8, 1200
SEEDS = (0, 1, 2)
# Three seeds do not tell half a percent.
MANY_SEEDS = range(8)
BATCHES = (4, 8, 16)
LENGTHS = (1.25, 1.5)
# On these links DDP spends little, half and nine tenths of its step communicating.
RATES = ("1gbit", "120mbit", "12mbit")
# Speed and latency, one way.
DISTANT = ("100mbit+50ms", "12mbit+25ms")

Rates = tuple[float, float]
USUAL = "DDP, Muon"
# Learning rates of (matrices, everything else), by the number of replicas. AdamW has one rate. With Dion and Muon the
# second rate matters most. A method that is not swept with more replicas takes its rates of two.
_ADAMW = ((0.0015, 0.0015), (0.003, 0.003), (0.006, 0.006))
_MATRICES = ((0.012, 0.006), (0.012, 0.012), (0.012, 0.024))
# The highest rate was best, so one more.
_WIDER = (*_MATRICES[1:], (0.012, 0.048))
_OF_MUON = ((0.008, 0.024), (0.012, 0.024), (0.016, 0.024))
_MORE_OF_MUON = ((0.012, 0.024), (0.016, 0.024), (0.024, 0.024))
SWEEPS: dict[int, dict[str, tuple[Rates, ...]]] = {
    2: {
        "DDP, AdamW": _ADAMW,
        USUAL: _OF_MUON,
        "DDP, Dion": _WIDER,
        DEFAULT: _MORE_OF_MUON,
        HALF_RANK: _WIDER,
        "local SGD, H=30": _MATRICES,
        "DiLoCo, AdamW, H=30": ((0.0007, 0.0007), *_ADAMW[:2]),
        "DiLoCo, Dion, H=30": _MATRICES,
        "DiLoCo, Muon, H=30": (*_MATRICES[1:], (0.02, 0.024)),
    },
    4: {
        USUAL: _MORE_OF_MUON,
        "DDP, Dion": ((0.012, 0.024), (0.012, 0.048), (0.024, 0.024)),
        DEFAULT: _MORE_OF_MUON,
        HALF_RANK: ((0.012, 0.024), (0.024, 0.048), (0.036, 0.048)),
    },
    8: {
        USUAL: _MORE_OF_MUON,
        DEFAULT: _MORE_OF_MUON,
    },
}
# What a sync step does to the momentum.
MOMENTA = tuple(name for name in METHODS if name.startswith("ours: ") and "momentum" in name)
# Who waits for whom.
OVERLAPS = tuple(name for name in METHODS if name.startswith("ours: lag"))
OVERLAPS_OF_FOUR = (DEFAULT, "ours: lag 1, overlap 1", "ours: lag 5, overlap 3")
# What ends so close that it takes many seeds to tell.
CLOSE = (
    USUAL,
    DEFAULT,
    "ours: momentum local",
    *[f"ours: lag {lag}, overlap {overlap}" for lag, overlap in ((1, 1), (1, 2))],
)
QUOTED = (
    "DDP, AdamW",
    USUAL,
    "DDP, Dion",
    "local SGD, H=10",
    "local SGD, H=30",
    "DiLoCo, Muon, H=30",
    "as published, tau=0.1",
    DEFAULT,
    "no communication",
)
BATCH_METHODS = ("DDP, AdamW", USUAL, "local SGD, H=30", DEFAULT, "no communication")
# The default trigger, and others that synchronise about as often. Everything else is equal.
TRIGGERS = (DEFAULT, *[f"ours: H={n}" for n in PERIODS], "ours: drift 0.028")
TIMED = (*QUOTED, "DDP, PowerSGD", "Dion factors, rank 1/4, every step")
RACERS = ("DDP, AdamW", USUAL, DEFAULT, "no communication")
# Another text, and another size with its steps.
ELSEWHERE = (("headers", "131k", STEPS), ("python", "1m", 600))
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


def swept(method: str, rows: Iterable[Row], replicas: int = 2) -> dict[Rates, float]:
    """Loss by learning rates: the finished part of the sweep that the method uses."""
    family = METHODS[method].sweep or method
    if family not in SWEEPS.get(replicas, {}):
        replicas = 2
    base = replace(BASE, method=family, replicas=replicas)
    wanted = {with_rates(base, rates): rates for rates in SWEEPS[replicas][family]}
    return {wanted[row.run]: row.outcome.val_loss for row in rows if row.run in wanted}


def best_rates(method: str, rows: Iterable[Row], replicas: int = 2) -> Rates:
    """Learning rates with the lowest loss in the sweep that the method uses; the middle ones before any run."""
    done = swept(method, rows, replicas)
    return min(done, key=done.__getitem__) if done else SWEEPS[2][METHODS[method].sweep or method][1]


def tuned(methods: Iterable[str], rows: list[Row], **changes: object) -> list[Run]:
    """Runs at the base settings with some changes, each method at its best learning rates."""
    base = replace(BASE, **changes)  # type: ignore[arg-type]
    return [with_rates(replace(base, method=name), best_rates(name, rows, base.replicas)) for name in methods]


def sweep(replicas: int) -> list[Run]:
    """Every method of a sweep at all its learning rates."""
    base = replace(BASE, replicas=replicas)
    return [
        with_rates(replace(base, method=name), rates) for name, pairs in SWEEPS[replicas].items() for rates in pairs
    ]


def links(rows: list[Row]) -> list[Run]:
    """Timed runs on every link, and more on the slowest for medians: another seed is another measurement."""
    once = [run for rate in ("", *RATES) for run in timed(tuned(TIMED, rows, rate=rate))]
    return once + [run for seed in SEEDS[1:] for run in timed(tuned(RACERS, rows, rate=RATES[-1], seed=seed))]


def distant(rows: list[Row]) -> list[Run]:
    """Timed runs on links with latency."""
    return [run for rate in DISTANT for run in timed(tuned(RACERS, rows, rate=rate))]


def timed(runs: Iterable[Run]) -> list[Run]:
    """The runs, shortened to what a time needs."""
    dense = [name for name, method in METHODS.items() if method.ddp or name.endswith("every step")]
    return [replace(run, stop=FEW if run.method in dense else MANY) for run in runs]


def over_seeds(methods: Iterable[str], rows: list[Row], seeds: Iterable[int] = SEEDS, **changes: object) -> list[Run]:
    """Tuned runs over all seeds."""
    methods = list(methods)
    return [run for seed in seeds for run in tuned(methods, rows, seed=seed, **changes)]


def disturbed(rows: list[Row]) -> list[Run]:
    """Triggers, with a change in the middle of the run."""
    return [run for kind in ("lr", "data") for run in over_seeds(TRIGGERS, rows, disturbance=kind)]


def lengths(rows: list[Row]) -> list[Run]:
    """Longer runs of the defaults."""
    return [run for length in LENGTHS for run in over_seeds([DEFAULT], rows, steps=round(length * STEPS))]


def elsewhere(rows: list[Row]) -> list[Run]:
    """Another text and another size, at the rates of the first."""
    return [
        run
        for corpus, model, steps in ELSEWHERE
        for replicas in (2, 4)
        for run in over_seeds([USUAL, DEFAULT], rows, corpus=corpus, model=model, steps=steps, replicas=replicas)
    ]


def races(rows: list[Row]) -> list[Run]:
    """Whole runs on the slowest link: DDP's, and a run of the defaults that is long enough to pass it."""
    steps = round(LENGTHS[0] * STEPS)
    return tuned([DEFAULT], rows, rate=RATES[-1], steps=steps) + tuned([USUAL], rows, rate=RATES[-1])


PLANS: dict[str, Callable[[list[Row]], list[Run]]] = {
    "sweep": lambda rows: sweep(2),
    "seeds": lambda rows: over_seeds(dict.fromkeys([*QUOTED, *TRIGGERS]), rows),
    "lengths": lengths,
    "disturbed": disturbed,
    "methods": lambda rows: tuned(METHODS, rows),
    "batches": lambda rows: [run for batch in BATCHES for run in tuned(BATCH_METHODS, rows, sequences=batch)],
    "sweep of four": lambda rows: sweep(4),
    "four": lambda rows: list(
        dict.fromkeys(over_seeds([USUAL, *TRIGGERS], rows, replicas=4) + tuned(QUOTED, rows, replicas=4))
    ),
    "momenta": lambda rows: over_seeds(MOMENTA, rows),
    "overlap": lambda rows: over_seeds(OVERLAPS, rows) + over_seeds(OVERLAPS_OF_FOUR, rows, replicas=4),
    "many seeds": lambda rows: over_seeds(CLOSE, rows, MANY_SEEDS),
    "sweep of eight": lambda rows: sweep(8),
    "eight": lambda rows: over_seeds([USUAL, DEFAULT], rows, replicas=8),
    "elsewhere": elsewhere,
    "links": links,
    "distant": distant,
    "races": races,
}
STAGES = tuple(PLANS)


def plan(stage: str, rows: list[Row]) -> list[Run]:
    """The runs of a stage, whether done or not. ``rows`` decide the learning rates."""
    return PLANS[stage](rows)
