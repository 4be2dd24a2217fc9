"""What a large vocabulary costs: a GPT on the words of Python's standard library, with and without sparse rows.

    python examples/benchmarks/vocabulary.py             # 256 and 50 000 words
    python examples/benchmarks/vocabulary.py --smoke     # a few steps

trains on two replicas that synchronise every 6 steps, and prints for each run: the share of the rows that some replica
looked up between two syncs, the payload of a sync step, the bytes of all steps beside DDP's, and the loss of the
consensus. ``--shares`` lists from which share of the farthest row's displacement on a row travels
(``sparse_rows.py``); with 0 all rows do.
"""

import argparse
import re
import time
from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from examples.benchmarks.replica_training import CONTEXT, COOLDOWN, SEQUENCES, WARMUP, cross_entropy, on_replicas
from examples.byte_gpt import GPT, WHOLE, StandardLibrary
from lightning_curvadion import CurvaDion, EveryNSteps, ProcessGroupSync, split_parameters
from lightning_curvadion.sync import sparse_rows
from lightning_curvadion.sync.payloads import FEWEST_ROWS

WORD = re.compile(rb"\w+|\s+|[^\w\s]")
PERIOD = 6
LR, VECTOR_LR = 0.016, 0.006
VALIDATION = 64


def words(
    path: str, vocabulary: int, most_common: Sequence[bytes] | None = None, size: int = -1
) -> tuple[Tensor, list[bytes]]:
    """The words of a text as numbers, and the most common ones by number. Number 0 is every other word.

    Args:
        path: File of the text.
        vocabulary: How many numbers there are.
        most_common: Words that have one, by default the most common ones of the text.
        size: How many bytes of the text are read, all by default.
    """
    with open(path, "rb") as file:
        found = WORD.findall(file.read(size))
    if most_common is None:
        most_common = [word for word, _ in Counter(found).most_common(vocabulary - 1)]
    number = {word: n for n, word in enumerate(most_common, start=1)}
    return torch.tensor([number.get(word, 0) for word in found]), list(most_common)


def train(train_words: Tensor, val_words: Tensor, vocabulary: int, share: float, steps: int, seed: int) -> None:
    """Train one run and print its row. Every replica calls it."""
    sparse_rows.SHARE_OF_FARTHEST = share
    torch.manual_seed(seed)
    model = GPT(layers=2, width=64, heads=4, context=CONTEXT, vocabulary=vocabulary)
    groups = split_parameters(model, options={"adamw": {"lr": VECTOR_LR}, **WHOLE})
    optimizer = CurvaDion(groups, lr=LR, trigger=EveryNSteps(PERIOD))
    sync = ProcessGroupSync()
    optimizer.register_sync_hook(sync)
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP, (steps - step) / (COOLDOWN * steps)))
    order = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
    looked_up, shares_looked_up, sent = torch.zeros(vocabulary), [], []
    start = time.perf_counter()
    for _ in range(steps):
        batch = windows(train_words, torch.randint(len(train_words) - CONTEXT, (SEQUENCES,), generator=order))
        looked_up[batch[:, :-1].flatten()] = 1
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()
        schedule.step()
        assert optimizer.last_step is not None
        if optimizer.last_step.synced:
            sent.append(optimizer.last_step.bytes_sent)
            dist.all_reduce(looked_up, op=dist.ReduceOp.MAX)
            shares_looked_up.append(looked_up.mean().item())
            looked_up.zero_()
    seconds = time.perf_counter() - start
    sync.reach_consensus(optimizer)
    loss = validation_loss(model, val_words)
    if dist.get_rank() == 0:
        every_step = sum(parameter.nbytes for parameter in model.parameters())
        print(
            f"| {vocabulary:,} | {share:g} | {100 * sum(shares_looked_up) / len(shares_looked_up):.1f} % "
            f"| {sum(sent) / len(sent) / 1e3:,.0f} kB | {100 * sum(sent) / (steps * every_step):.3f} % "
            f"| {loss:.4f} | {seconds:.0f} s |",
            flush=True,
        )


def windows(numbers: Tensor, starts: Tensor) -> Tensor:
    """Windows of CONTEXT + 1 words, shape (len(starts), CONTEXT + 1)."""
    return numbers[starts.unsqueeze(1) + torch.arange(CONTEXT + 1)]


@torch.no_grad()
def validation_loss(model: GPT, numbers: Tensor) -> float:
    """Nats a word of evenly spaced windows."""
    starts = torch.linspace(0, len(numbers) - CONTEXT - 1, VALIDATION * SEQUENCES).long().split(SEQUENCES)
    return sum(cross_entropy(model, windows(numbers, part)).item() for part in starts) / len(starts)


def train_all(args: argparse.Namespace) -> None:
    """Every run of the table. Every replica calls it."""
    cache = StandardLibrary().cache
    for vocabulary in args.vocabularies:
        train_words, most_common = words(str(cache / "train.bin"), vocabulary, size=args.size)
        val_words, _ = words(str(cache / "val.bin"), vocabulary, most_common, args.size)
        for seed in args.seeds:
            for share in args.shares if vocabulary >= FEWEST_ROWS else args.shares[:1]:
                train(train_words, val_words, vocabulary, share, args.steps, seed)


def main() -> None:
    """Parse the arguments, train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[256, 50_000], metavar="WORDS")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, sparse_rows.SHARE_OF_FARTHEST])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--smoke", action="store_true", help="a few steps of small vocabularies and texts")
    args = parser.parse_args()
    args.size = -1
    if args.smoke:
        args.vocabularies, args.steps, args.size = [256, FEWEST_ROWS], 2 * PERIOD, 500_000
    StandardLibrary().prepare_data()
    print("| words | share | looked up between syncs | a sync | of DDP's bytes | loss | time |")
    print("|" + " --- |" * 7, flush=True)
    on_replicas(2, train_all, args)


if __name__ == "__main__":
    main()
