"""Trains every feature of ``features/`` on two replicas of a run whose replicas may come and go. None of them does.

    python tests/trainer/elastic_features.py                # all of them; 2 minutes on two cores
    python tests/trainer/elastic_features.py --only max_time

``tests/trainer/test_elastic.py`` has one of them.
"""

import argparse
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    sys.path[:0] = [
        str(Path(__file__).parents[2]),
        *(str(Path(__file__).parents[1] / name) for name in ("helpers", "")),
    ]

import preloaded
import torch
from features import ROWS, Run, registry
from launching import ROOT, environment
from training import python_path

from lightning_curvadion import CurvaDionStrategy
from lightning_curvadion.sync.membership import host_store

# With a loss scale, which is refused.
REFUSED = ("precision", "16-mixed")


class Elastic(CurvaDionStrategy):
    """What a feature trains with."""

    def __init__(self) -> None:
        super().__init__(elastic=True, min_replicas=2, timeout=timedelta(seconds=20))


def train(key: tuple[str, str], folder: Path) -> list[dict]:
    """Train a feature: what became of it on each of two replicas."""
    store = host_store(0, "127.0.0.1")
    paths = python_path(ROOT, *(ROOT / "tests" / name for name in ("", "helpers", "trainer")))
    variables = {**environment(OMP_NUM_THREADS="1", MASTER_PORT=str(store.port)), "PYTHONPATH": paths}
    processes = [
        preloaded.start(
            Path(__file__), "--replica", str(rank), *key, folder=folder, output=folder / f"log{rank}", **variables
        )
        for rank in (0, 1)
    ]
    try:
        statuses = [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    printed = [(folder / f"log{rank}").read_text() for rank in (0, 1)]
    assert statuses == [0, 0], "\n".join(text[-3000:] for text in printed)
    return [json.loads(text.splitlines()[-1]) for text in printed]


def check(first: dict, second: dict) -> None:
    """What must be true of the two."""
    assert first == second and first["steps"], (first, second)


def replica(rank: int, key: tuple[str, str]) -> None:
    """Train a feature as one of two replicas."""
    torch.set_num_threads(1)
    with mock.patch.object(registry, "CurvaDionStrategy", Elastic):
        run = Run(rank, 2, "curvadion", key[1], str(Path.cwd()))
        ROWS[key](run)
    outcome = run.outcome()
    print(json.dumps({name: outcome[name] for name in ("steps", "epochs", "metrics", "parameters", "validated")}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a name")
    parser.add_argument("--replica", nargs=3, metavar=("RANK", "AREA", "NAME"), help="train as one of two")
    options = parser.parse_args()
    if options.replica:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        replica(int(options.replica[0]), (options.replica[1], options.replica[2]))
        return
    keys = [key for key, row in ROWS.items() if callable(row) and key != REFUSED and options.only in key[1]]

    def survives(key: tuple[str, str]) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            try:
                check(*train(key, Path(folder)))
            except (AssertionError, TimeoutError) as error:
                print(f"{', '.join(key)}: FAILED {error}", flush=True)
                return False
        print(f"{', '.join(key)}: trained", flush=True)
        return True

    with ThreadPoolExecutor(2) as threads:
        trained = sum(threads.map(survives, keys))
    print(f"{trained} of {len(keys)} features train, and {', '.join(REFUSED)} is refused")
    sys.exit(trained < len(keys))


if __name__ == "__main__":
    main()
