"""Replicas that are lost and that come while a run trains: nobody else starts again.

    python examples/elastic.py

It starts three replicas on this machine, kills one in the middle, adds another later, and prints what each replica
notices of it. On several machines, of which one holds the address of the run, as long as the run takes:

    python examples/elastic.py --store 29400
    python examples/elastic.py --join HOST:29400    # on each machine, at any time
"""

import argparse
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch.nn import functional as F

from examples.byte_gpt import GPT, StandardLibrary, Windows
from lightning_curvadion import CurvaDion, ProcessGroupSync, split_parameters
from lightning_curvadion.sync.errors import ReplicaLostError
from lightning_curvadion.sync.membership import Membership, host_store

CONTEXT, SEQUENCES = 64, 8


def train(endpoint: str, steps: int, name: str) -> None:
    """Train as one replica until the run has taken some steps.

    Args:
        endpoint: Address of the run.
        steps: Of the run, whoever takes part.
        name: For what is printed.
    """
    torch.set_num_threads(1)
    data = StandardLibrary(context=CONTEXT)
    data.prepare_data()
    windows = Windows(data.cache / "train.bin", CONTEXT + 1, CONTEXT)
    members = Membership(endpoint, min_replicas=2)
    model = GPT(layers=2, width=64, heads=4, context=CONTEXT)
    optimizer = CurvaDion(split_parameters(model), lr=0.02)
    optimizer.register_sync_hook(sync := ProcessGroupSync())
    sync.include_module(model)

    def join(step: int) -> int:
        start = time.perf_counter()
        step = int(members.join(sync, {"step": step})["step"])
        print(f"{name}: step {step}, {members.size} replicas, {time.perf_counter() - start:.1f} s", flush=True)
        return step

    # No two replicas draw the same windows.
    choice = random.Random()
    step, loss = join(0), torch.tensor(0.0)
    while step < steps:
        batch = torch.stack([windows[choice.randrange(len(windows))] for _ in range(SEQUENCES)])
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        try:
            optimizer.step()
            step += 1
            if not members.should_regroup(sync):
                continue
        except ReplicaLostError:
            print(f"{name}: a replica is lost", flush=True)
        step = join(step)
    sync.reach_consensus(optimizer, include_state=True)
    print(f"{name}: the run ends after {step} steps at a loss of {loss.item():.3f}", flush=True)
    members.close()


def show(steps: int) -> None:
    """Start three replicas, kill one, and add one."""
    store = host_store(0, "127.0.0.1")

    def start(name: str) -> subprocess.Popen[bytes]:
        words = [sys.executable, __file__, "--join", f"127.0.0.1:{store.port}", "--steps", str(steps), "--name", name]
        return subprocess.Popen(words)

    replicas = {name: start(name) for name in "ABC"}
    time.sleep(25)
    print("C is killed", flush=True)
    replicas.pop("C").send_signal(signal.SIGKILL)
    time.sleep(15)
    print("D comes", flush=True)
    replicas["D"] = start("D")
    for replica in replicas.values():
        replica.wait()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--join", metavar="HOST:PORT", help="take part in a run")
    parser.add_argument("--store", type=int, metavar="PORT", help="hold the address of runs")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--name", default="this replica")
    options = parser.parse_args()
    if options.join:
        train(options.join, options.steps, options.name)
    elif options.store:
        _store = host_store(options.store)
        signal.pause()
    else:
        show(options.steps)


if __name__ == "__main__":
    main()
