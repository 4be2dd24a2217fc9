"""Every way to train over a slow link that a Lightning user has, on the same model, data, order and schedule.

    python examples/benchmarks/compare.py --run          # hours; runs what results/compare.csv lacks, stage after stage
    python examples/benchmarks/compare.py --run sweep    # one stage, or several
    python examples/benchmarks/compare.py --tables       # what the CSV says, as Markdown
    python examples/benchmarks/compare.py --plots        # and as pictures, into results/ (pip install matplotlib)
    python examples/benchmarks/compare.py --smoke        # a few steps of some of it, under two minutes

Replicas are processes on hosts of their own in a network lab (``netlab.py``), so that bytes are the kernel's count;
without root they share the loopback interface: no count, no slow link. Stages, in order: ``sweep`` (learning rates),
``links`` (time at three link speeds; wants the machine for itself), ``seeds`` (the rows that the README quotes),
``budgets`` (a sparser trigger, over seeds), ``lengths`` (longer runs of ours), ``disturbed``, ``methods`` (every row
once), ``batches``, ``sweep of four`` and ``replicas`` (four of them), ``races`` (whole runs on the slowest link).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from examples.benchmarks import compare_plan  # noqa: E402
from examples.benchmarks.compare_plan import BASE  # noqa: E402
from examples.benchmarks.compare_replica import Run  # noqa: E402
from examples.benchmarks.compare_report import GOAL, plots, tables  # noqa: E402
from examples.benchmarks.methods import DEFAULT  # noqa: E402
from examples.benchmarks.netlab import Lab, LabError, interruptible, missing  # noqa: E402
from examples.byte_gpt import StandardLibrary  # noqa: E402

EVALUATIONS, VAL_SEQUENCES = 8, 1024


def run(runs: Sequence[Run], results: Path, evaluations: int = EVALUATIONS, val_sequences: int = VAL_SEQUENCES) -> None:
    """Train what the CSV lacks, the runs of one number of replicas and one link in one lab."""
    done = {row.run for row in compare_plan.read(results)}
    todo = [entry for entry in dict.fromkeys(runs) if entry not in done]
    StandardLibrary().prepare_data()
    results.parent.mkdir(parents=True, exist_ok=True)
    loopback = bool(missing())
    for (replicas, rate), group in groupby(todo, key=lambda entry: (entry.replicas, entry.rate)):
        if loopback and rate:
            raise LabError(f"a link of {rate} needs a network lab, which lacks {', '.join(missing())}")
        job = {"runs": [asdict(entry) for entry in group], "evaluations": evaluations, "val_sequences": val_sequences}
        script = [str(ROOT / "examples/benchmarks/compare_replica.py"), json.dumps(job), str(results)]
        with Lab(replicas, rate or None, loopback) as lab:
            lab.run(script, environment=_environment())


def _environment() -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "COMPARE_COMMIT": commit.strip(),
        # Hosts of the lab have no names, and torch would say so at every connection.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }


def smoke(folder: Path) -> None:
    """A few methods for a few steps, two of them on a slow link, and what is made of them."""
    results = folder / "compare.csv"
    methods = ("DDP, AdamW", "DDP, Muon", "DDP, Dion", "DDP, PowerSGD", "DiLoCo, AdamW, H=10", DEFAULT)
    rows = [
        compare_plan.with_rates(replace(BASE, method=name, steps=12), compare_plan.best_rates(name, []))
        for name in methods
    ]
    if not missing():
        rows += [replace(row, rate=compare_plan.RATES[-1], stop=6) for row in rows if row.method in (GOAL, DEFAULT)]
    run(rows, results, evaluations=2, val_sequences=64)
    tables(results, steps=12)
    plots(results, folder, steps=12)


def main() -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="*", metavar="STAGE", choices=compare_plan.STAGES, help="train")
    parser.add_argument("--tables", action="store_true", help="print the tables")
    parser.add_argument("--plots", action="store_true", help="draw the plots")
    parser.add_argument("--smoke", nargs="?", type=Path, const=Path(), metavar="FOLDER", help="a little of everything")
    options = parser.parse_args()
    smoke_folder = options.smoke.resolve() if options.smoke is not None and options.smoke.name else None
    os.chdir(ROOT)
    try:
        with interruptible():
            if options.smoke is not None:
                with tempfile.TemporaryDirectory() as folder:
                    # Runs that a folder holds would not be made again, so the default is an empty one.
                    smoke(smoke_folder or Path(folder))
            if options.run is not None:
                for stage in options.run or compare_plan.STAGES:
                    run(compare_plan.plan(stage, compare_plan.read(compare_plan.RESULTS)), compare_plan.RESULTS)
    except LabError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what is done is in the CSV, and the same command goes on", file=sys.stderr)
        return 130
    if options.tables:
        tables(compare_plan.RESULTS)
    if options.plots:
        plots(compare_plan.RESULTS, compare_plan.RESULTS.parent)
    return 0


if __name__ == "__main__":
    sys.exit(main())
