"""What a lag and an overlap bring back of the speed without communication.

    python examples/benchmarks/delays.py                                # half an hour; leave the machine idle
    python examples/benchmarks/delays.py --rate 12mbit --model 1m       # one link, two replicas
    python examples/benchmarks/delays.py --rate 100mbit --latency 25ms --replicas 4
    python examples/benchmarks/delays.py --smoke

The replicas train the GPT of ``compare.py`` in a loop of their own, each on a host of the network lab (``netlab.py``),
which needs root. A machine's speed changes within minutes, so all ways to train take turns, some steps a round. The
share of the speed without communication is the median over the rounds of the share in the same round. "busy" is the
processor time of the training thread in a step. The rest of a step it waits: for bytes, or for a processor that it
shares with the other replicas, with gloo's threads and, where there is latency, with the lab's delay line.
"""

import argparse
import datetime
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.benchmarks.compare_plan import RESULTS, best_rates, read  # noqa: E402
from examples.benchmarks.compare_replica import CONTEXT  # noqa: E402
from examples.benchmarks.corpora import CORPORA, SIZES  # noqa: E402
from examples.benchmarks.methods import METHODS  # noqa: E402
from examples.benchmarks.netlab import Lab, exit_status, missing, quiet_environment  # noqa: E402
from examples.byte_gpt import GPT, WHOLE, warmup_and_cooldown  # noqa: E402
from lightning_curvadion import CurvaDion, ProcessGroupSync, split_parameters  # noqa: E402

CORPUS, SEQUENCES, SCHEDULE = "python", 8, 1200
DDP, ALONE = "DDP, AdamW", "no communication, Muon"
# A step of DDP takes as long on the slow link as many of the others.
DDP_SHARE = 50
COLUMNS = (
    *("parameters", "replicas", "link", "method", "steps/s", "of none", "in rounds"),
    *("busy, ms", "waits, ms", "sync steps"),
)
LAGS = ((0, 0), (1, 0), (1, 1), (1, 2), (5, 3), (5, 5))


@dataclass(frozen=True)
class Setup:
    """A lab, and what trains there.

    Attributes:
        rate: Of the links.
        latency: Of a frame, one way.
        replicas: One a host.
        model: Name in ``corpora.SIZES``.
        lags: Pairs of lag and overlap.
    """

    rate: str
    latency: str = "0ms"
    replicas: int = 2
    model: str = "131k"
    lags: Sequence[Sequence[int]] = field(default=LAGS)


SETUPS = (
    Setup("12mbit"),
    Setup("100mbit", "25ms"),
    Setup("12mbit", model="1m", lags=LAGS[:4]),
    Setup("12mbit", replicas=4, lags=LAGS[1:3]),
    Setup("100mbit", "25ms", replicas=4, lags=(LAGS[1], *LAGS[4:])),
)


class Loss(nn.Module):
    """A model together with its loss, in nats a byte: what DistributedDataParallel wraps."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Tensor) -> Tensor:
        """Mean loss of a batch of shape (sequences, context + 1)."""
        return F.cross_entropy(self.model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


@dataclass
class Timing:
    """Of one way in one round: steps a second, busy milliseconds of a step, and the share of sync steps."""

    speed: float
    busy: float
    syncs: float


class Way:
    """One way to train, with a model of its own that goes on where the round before has left it."""

    def __init__(self, name: str, model: str, batches: Sequence[Tensor]) -> None:
        torch.manual_seed(0)
        self._method = METHODS[name]
        gpt = GPT(*SIZES[model], CONTEXT)
        self._loss: nn.Module = Loss(gpt)
        lr, vector_lr = best_rates(name, read(RESULTS))
        self._optimizer = self._method.optimizer(split_parameters(gpt, options=WHOLE), lr=lr, vector_lr=vector_lr)
        self._schedule = LambdaLR(self._optimizer, partial(warmup_and_cooldown, total=SCHEDULE))
        if self._method.ddp:
            self._loss = DistributedDataParallel(self._loss)
        elif not self._method.alone:
            assert isinstance(self._optimizer, CurvaDion)
            hook = ProcessGroupSync(**self._method.hook)
            self._optimizer.register_sync_hook(hook)
            hook.include_module(gpt)
        self._batches = itertools.cycle(batches)

    def time_steps(self, steps: int) -> Timing:
        """Take some steps, of which the slowest replica's time counts. Every replica calls it."""
        steps = max(1, steps // DDP_SHARE) if self._method.ddp else steps
        syncs = 0
        dist.barrier()
        start, start_busy = time.perf_counter(), time.thread_time()
        for batch in itertools.islice(self._batches, steps):
            self._optimizer.zero_grad()
            self._loss(batch).backward()
            self._optimizer.step()
            self._schedule.step()
            # Without a hook a CurvaDion reports what its trigger wanted.
            report = None if self._method.alone else getattr(self._optimizer, "last_step", None)
            syncs += report.synced if report else self._method.ddp
        busy = time.thread_time() - start_busy
        dist.barrier()
        return Timing(steps / (time.perf_counter() - start), 1e3 * busy / steps, syncs / steps)


def batches_of(count: int) -> list[Tensor]:
    """So many batches of this replica."""
    data = CORPORA[CORPUS](context=CONTEXT, batch_size=SEQUENCES).train_dataloader().dataset
    order = torch.Generator().manual_seed(1 + dist.get_rank())
    return list(itertools.islice(DataLoader(data, SEQUENCES, shuffle=True, generator=order), count))


def replica(setup: Setup, rounds: int, steps: int) -> None:
    """Train on one host. Rank 0 prints a row for each way."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=10))
    names = [DDP, ALONE, *(f"ours: lag {lag}, overlap {overlap}" for lag, overlap in setup.lags)]
    batches = batches_of((rounds + 1) * steps)
    ways = {name: Way(name, setup.model, batches) for name in names}
    timings: dict[str, list[Timing]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name, way in ways.items():
            timing = way.time_steps(steps)
            # The first round opens connections, and warms up.
            if number:
                timings[name].append(timing)
    if dist.get_rank() == 0:
        for name, own in timings.items():
            print_row(setup, name, own, timings[ALONE])
    dist.destroy_process_group()


def print_row(setup: Setup, name: str, own: Sequence[Timing], alone: Sequence[Timing]) -> None:
    """Print what a way took in the rounds, beside what no communication took in the same rounds."""
    shares = [timing.speed / most.speed for timing, most in zip(own, alone, strict=True)]
    speed, busy = (statistics.median(getattr(timing, value) for timing in own) for value in ("speed", "busy"))
    waiting = statistics.median(1e3 / timing.speed - timing.busy for timing in own)
    syncs = statistics.mean(timing.syncs for timing in own)
    link = setup.rate if setup.latency == "0ms" else f"{setup.rate}, {setup.latency}"
    percent = [f"{100 * share:.0f}" for share in (statistics.median(shares), min(shares), max(shares))]
    row = [
        setup.model,
        setup.replicas,
        link,
        name,
        f"{speed:.1f}",
        f"{percent[0]} %",
        f"{percent[1]} to {percent[2]} %",
    ]
    print_cells([*row, f"{busy:.1f}", f"{waiting:.1f}", f"{100 * syncs:.0f} %"])


def print_cells(cells: Sequence[object]) -> None:
    """Print a row of a Markdown table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def run(setup: Setup, rounds: int, steps: int, loopback: bool = False) -> None:
    """Train in a lab of the setup."""
    rate, latency = (None, None) if loopback else (setup.rate, None if setup.latency == "0ms" else setup.latency)
    with Lab(setup.replicas, rate, loopback, latency) as lab:
        script = [__file__, json.dumps(asdict(setup)), str(rounds), str(steps)]
        lab.run(script, environment=quiet_environment(ROOT))


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", help="of the links, such as 12mbit; without it all setups run")
    parser.add_argument("--latency", default="0ms", help="of a frame, one way")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--model", default="131k", choices=SIZES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100, help="of each way in a round")
    parser.add_argument("--smoke", action="store_true", help="a few steps, over the loopback interface without root")
    options = parser.parse_args()
    os.chdir(ROOT)
    CORPORA[CORPUS]().prepare_data()
    print_cells(COLUMNS)
    print_cells(["---"] * len(COLUMNS))

    def work() -> None:
        if options.smoke:
            run(Setup("12mbit", lags=LAGS[1:3]), rounds=1, steps=6, loopback=bool(missing()))
            return
        own = Setup(options.rate, options.latency, options.replicas, options.model)
        for setup in (own,) if options.rate else SETUPS:
            run(setup, options.rounds, options.steps)

    return exit_status(work, "interrupted")


if __name__ == "__main__":
    if "RANK" in os.environ:
        replica(Setup(**json.loads(sys.argv[1])), *map(int, sys.argv[2:]))
    else:
        sys.exit(main())
