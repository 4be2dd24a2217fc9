"""One replica of ``models.py``: it trains one run after another, and rank 0 writes a CSV row for each."""

import logging
import os
import time
import warnings
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy

from examples.benchmarks.compare_replica import QUIET
from examples.benchmarks.image_models import GAN, ResNet, ViT
from examples.benchmarks.layout_models import LAYOUTS
from examples.benchmarks.methods import DEFAULT, METHODS, Method
from examples.benchmarks.model_task import ModelTask, Score
from examples.benchmarks.replica_training import append, read
from examples.benchmarks.text_models import GPT2, LSTM, Llama, LoRA, MixtureOfExperts, TextClassifier
from lightning_curvadion import CurvaDionStrategy, EveryNSteps, IntegratedRMMC

TASKS: dict[str, type[ModelTask]] = {
    "ResNet": ResNet,
    "ViT": ViT,
    "GPT-2": GPT2,
    "Llama": Llama,
    "LSTM": LSTM,
    "LoRA": LoRA,
    "mixture of experts": MixtureOfExperts,
    "GAN": GAN,
    "text classifier": TextClassifier,
}
# With those of which a layout is asked.
ALL_TASKS = TASKS | {name: task for layouts in LAYOUTS.values() for name, task in layouts.items()}
ADAMW, MUON, OURS, CARRIED = "DDP, AdamW", "DDP, Muon", "ours", "ours, match_rms_adamw"
# Parts of ours taken away one at a time, to see which of them loses.
PARTS = {
    "budget 0.2": Method("muon", trigger=IntegratedRMMC(0.2)),
    "momentum local": METHODS["ours: momentum local"],
    "momentum average in int8": METHODS["ours: momentum average in int8"],
    "float32": METHODS["ours: float32"],
    "one bit for biases": Method("muon", hook={"vector_format": "sign"}),
    "int8 for the rest": Method("muon", hook={"vector_format": "int8"}),
    "every step": Method("muon", trigger=EveryNSteps(1)),
    "every step, float32": Method("muon", trigger=EveryNSteps(1), hook={"wire_format": "float32"}),
    # What is left is the difference between the mean of the replicas' steps and the step of a mean.
    "every step, momenta averaged": Method(
        "muon",
        trigger=EveryNSteps(1),
        hook={"wire_format": "float32", "momentum": "average", "factor_format": "float32"},
    ),
}
TABLE_METHODS = {
    ADAMW: METHODS[ADAMW],
    # Without a hook CurvaDion is Muon on whatever split_parameters calls a matrix; torch.optim.Muon takes fewer.
    MUON: Method("dion", ddp=True, options={"local_update": "muon"}),
    OURS: METHODS[DEFAULT],
    CARRIED: Method("muon", options={"lr_scale": "match_rms_adamw"}),
    **PARTS,
}


@dataclass(frozen=True)
class Run:
    """Settings of a run: the first columns of the CSV.

    Attributes:
        model: Name in ``ALL_TASKS``.
        method: Name in ``TABLE_METHODS``.
        replicas: Number of replicas.
        lr: Learning rate of all parameters.
        seed: Seed of the model and of the order of the data.
        steps: Steps of the run.
    """

    model: str
    method: str
    replicas: int
    lr: float
    seed: int
    steps: int


@dataclass(frozen=True)
class Outcome:
    """Results of a run: the other columns of the CSV.

    Attributes:
        loss: Loss on held-out data, of the model that fit returns.
        accuracy: Share of right answers there, NaN where nothing is classified.
        train_loss: Mean loss of rank 0's batches over the last tenth of the run, NaN under manual optimization.
        sync_rate: Share of optimizer steps that synchronised.
        byte_share: What the strategy counted in steps, over a float32 gradient of all trained parameters at every step.
        seconds: Of fit.
    """

    loss: float
    accuracy: float
    train_loss: float
    sync_rate: float
    byte_share: float
    seconds: float


def finished(results: Path) -> dict[Run, tuple[Outcome, str]]:
    """The finished runs of a CSV, each with what came out and its commit. The newest of each counts."""

    def cells(kind: type, row: dict[str, str]) -> dict[str, Any]:
        return {field.name: field.type(row[field.name]) for field in fields(kind)}  # type: ignore[operator]

    return {Run(**cells(Run, row)): (Outcome(**cells(Outcome, row)), row["commit"]) for row in read(results)}


class Meter(pl.Callback):
    """Counts syncs and bytes before the consensus at the end of fit, and keeps the training loss."""

    def __init__(self) -> None:
        self.payload, self.sync_rate = 0, 1.0
        self.losses: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave out the first broadcast."""
        self.sent_before = trainer.strategy.sync.bytes_sent if isinstance(trainer.strategy, CurvaDionStrategy) else 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the counts."""
        self.losses.append(float(outputs["loss"]) if outputs else float("nan"))
        if isinstance(trainer.strategy, CurvaDionStrategy):
            self.payload = trainer.strategy.sync.bytes_sent - self.sent_before
            syncs = [optimizer.sync_steps for optimizer in trainer.optimizers]  # type: ignore[attr-defined]
            self.sync_rate = sum(syncs) / len(syncs) / len(self.losses)


def train(run: Run, batches: int | None = None) -> Outcome:
    """Train one run, and score it on so many held-out batches, by default all. Every replica calls it."""
    task, method = ALL_TASKS[run.model], TABLE_METHODS[run.method]
    pl.seed_everything(run.seed, verbose=False)
    module = task(partial(method.optimizer, lr=run.lr, vector_lr=run.lr), run.steps)
    # Dropout and noise of a replica are its own; the model is not.
    torch.manual_seed(1000 * run.seed + dist.get_rank())
    strategy = method.strategy()
    if task.optimizers_per_step > 1 and method.ddp:
        strategy = DDPStrategy(find_unused_parameters=True)
    meter = Meter()
    trainer = pl.Trainer(
        **QUIET,
        **task.trainer_options,
        num_nodes=run.replicas,
        strategy=strategy,
        plugins=[LightningEnvironment()],
        # Manual optimization counts the steps of every optimizer.
        max_steps=run.steps * task.optimizers_per_step,
        callbacks=[meter],
    )
    start = time.perf_counter()
    trainer.fit(module, module.data())
    seconds = time.perf_counter() - start
    last = meter.losses[-max(1, run.steps // 10) :]
    trained = sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
    # After the consensus all replicas hold one model, so rank 0's score is that of all.
    score = module.score(batches) if dist.get_rank() == 0 else Score(float("nan"), float("nan"))
    return Outcome(
        loss=round(score.loss, 5),
        accuracy=round(score.accuracy, 4),
        train_loss=round(sum(last) / len(last), 4),
        sync_rate=round(meter.sync_rate, 4),
        byte_share=round(meter.payload / (run.steps * trained), 5) if not method.ddp else 1.0,
        seconds=round(seconds, 1),
    )


def train_all(runs: list[Run], results: Path, commit: str, batches: int | None = None) -> None:
    """Train the runs, one after another, as ``train`` does. Every replica calls it, in a process group of its own."""
    # Or Lightning would list the devices at every run.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    # To Lightning every replica is a node with one process, which something else has started.
    os.environ |= {"NODE_RANK": str(dist.get_rank()), "LOCAL_RANK": "0"}
    for run in runs:
        outcome = train(run, batches)
        if dist.get_rank() == 0:
            append(results, {**asdict(run), **asdict(outcome), "commit": commit})
            print(
                f"{run.model}, {run.method}, {run.replicas} replicas, lr {run.lr:g}, seed {run.seed}:"
                f" loss {outcome.loss:.4f}, {100 * outcome.sync_rate:.0f} % of steps synced, {outcome.seconds:.0f} s",
                flush=True,
            )
