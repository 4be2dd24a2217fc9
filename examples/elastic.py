"""Replicas that are lost and that come while a run trains: nobody else starts again.

    python examples/elastic.py

It starts three replicas on this machine, kills one in the middle, adds another later, and prints what the others notice
of it. On several machines, one command on the one whose address all know, for as long as the run takes:

    python -m lightning_curvadion store --port 29400

and one command on each machine, at any time:

    MASTER_ADDR=10.0.0.1 MASTER_PORT=29400 python examples/elastic.py --train
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.byte_gpt import ByteGPT, StandardLibrary
from lightning_curvadion import CommunicationMonitor, CurvaDionStrategy
from lightning_curvadion.sync.membership import host_store


class Diary(Callback):
    """Prints what happens to the replicas, as this one sees it.

    Args:
        name: Of this replica.
    """

    def __init__(self, name: str) -> None:
        self.name, self.printed = name, 0

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        """Print what is new since the last batch."""
        assert isinstance(trainer.strategy, CurvaDionStrategy)
        changes = trainer.strategy.membership_changes
        for change in changes[self.printed :]:
            print(
                f"{self.name}, step {trainer.global_step}: {change.members} replicas, {change.lost} lost and"
                f" {change.joined} new ones, {change.seconds:.1f} s",
                flush=True,
            )
        self.printed = len(changes)


def train(name: str, steps: int) -> None:
    """Train as one replica, with others or not.

    Args:
        name: For what is printed.
        steps: Of the run, whoever takes part.
    """
    torch.set_num_threads(1)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=CurvaDionStrategy(elastic=True, min_replicas=2),
        max_steps=steps,
        callbacks=[Diary(name), CommunicationMonitor()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(ByteGPT(layers=2, width=64, context=64), StandardLibrary(context=64, batch_size=8))
    print(f"{name}: the run ends after {trainer.global_step} steps", flush=True)


def show(steps: int) -> None:
    """Start three replicas, kill one, and add one."""
    store = host_store(0, "127.0.0.1")
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "LOCAL_RANK": "0"}

    def start(name: str) -> subprocess.Popen[bytes]:
        words = [sys.executable, __file__, "--train", "--steps", str(steps), "--name", name]
        return subprocess.Popen(words, env={**os.environ, **address})

    replicas = {name: start(name) for name in "ABC"}
    time.sleep(25)
    print("C is killed", flush=True)
    replicas.pop("C").send_signal(signal.SIGKILL)
    time.sleep(10)
    print("D comes", flush=True)
    replicas["D"] = start("D")
    for replica in replicas.values():
        replica.wait()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="take part in a run")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--name", default="this replica")
    options = parser.parse_args()
    if options.train:
        train(options.name, options.steps)
    else:
        show(options.steps)


if __name__ == "__main__":
    main()
