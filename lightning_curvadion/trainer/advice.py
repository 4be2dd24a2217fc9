"""Advice: what defeats the purpose of a run, each with what to do instead.

Nothing here speaks of the loss. Over the models in ``examples/benchmarks/results/models.csv`` those that synchronise
more often lose less against DDP, not more (`pytest -s tests/trainer/test_advice.py -k lose`: rank correlation -0.5 over
18 settings), and no drift was recorded there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from torch import nn

# Shares of fewer steps mean little.
_STEPS_TO_JUDGE = 100
# Lowest and highest sync rate of the defaults among the finished runs in examples/benchmarks/results/*.csv: a GAN and
# a ViT. `pytest -s tests/trainer/test_advice.py -k measured` prints them.
MEASURED_SYNC_RATES = (0.1, 0.69)
_FAR_ABOVE = 1.25 * MEASURED_SYNC_RATES[1]
# Of the norm of the parameters: the main job peaks at 6 % and falls, the paper's literal method ends 35 % apart.
_FAR = 0.1
_SYNCS_TO_JUDGE = 4


@dataclass(frozen=True)
class RunSoFar:
    """The counts of a run so far.

    Attributes:
        steps: Optimizer steps.
        sync_steps: How many of them synchronised.
        step_bytes: Payload of this replica in steps.
        consensus_bytes: Payload between steps, for validations and checkpoints.
        drifts: Relative distances to the consensus, in order.
    """

    steps: int
    sync_steps: int
    step_bytes: int
    consensus_bytes: int
    drifts: Sequence[float]


def advice_on_model(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Pairs of a key and a sentence about the model, before training.

    Args:
        module: What is trained.

    Yields:
        ``"embedding"`` where one table is most of what every consensus sends.

    Example:
        >>> model = nn.Sequential(nn.Embedding(50_000, 32), nn.Linear(32, 32))
        >>> [key for key, _ in advice_on_model(model)]
        ['embedding']
    """
    total = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding) and part.weight.requires_grad and part.weight.numel() > total / 2:
            share = 100 * part.weight.numel() / total
            yield (
                "embedding",
                f"The embedding {name!r} holds {share:.0f} % of the parameters, and so of what every consensus sends."
                " Freeze it, tie it to the output head, use a smaller vocabulary, or send fewer bits (wire_format).",
            )


def advice_on_run(run: RunSoFar) -> Iterator[tuple[str, str]]:
    """Pairs of a key and a sentence about how the run communicates.

    Args:
        run: Its counts so far.

    Yields:
        ``"often"``, ``"never"``, ``"consensus"`` and ``"drift"``, where they apply.

    Example:
        >>> run = RunSoFar(steps=500, sync_steps=490, step_bytes=10**9, consensus_bytes=0, drifts=[0.01] * 490)
        >>> [key for key, _ in advice_on_run(run)]
        ['often']
    """
    if run.steps >= _STEPS_TO_JUDGE:
        if run.sync_steps > _FAR_ABOVE * run.steps:
            low, high = MEASURED_SYNC_RATES
            yield (
                "often",
                f"Replicas synchronised at {run.sync_steps} of {run.steps} steps, which saves little; with the defaults"
                f" {100 * low:.0f} to {100 * high:.0f} % were measured. Raise the budget of IntegratedRMMC, raise tau,"
                " or use CommunicationBudget(0.2). A larger batch lowers RMMC, and max_local_steps must not be small.",
            )
        # Every run's first step synchronises where RMMC decides: it counts as infinite.
        if run.sync_steps <= 1:
            yield (
                "never",
                f"Replicas synchronised at {run.sync_steps} of {run.steps} steps: they train models of their own. Lower"
                " the budget or tau, or set max_local_steps.",
            )
        if run.sync_steps > 1 and run.consensus_bytes > run.step_bytes:
            yield (
                "consensus",
                f"The consensus before validations and checkpoints sent {run.consensus_bytes / 1e6:.1f} MB, more than"
                f" the steps with {run.step_bytes / 1e6:.1f} MB. Validate and save less often: val_check_interval,"
                " ModelCheckpoint(every_n_train_steps=...).",
            )
    if len(run.drifts) >= _SYNCS_TO_JUDGE:
        half = len(run.drifts) // 2
        early, late = median(run.drifts[:half]), median(run.drifts[half:])
        if late > _FAR and late > 1.5 * early:
            yield (
                "drift",
                f"Replicas drift apart: {100 * late:.1f} % of the parameters' norm before the later syncs,"
                f" {100 * early:.1f} % before the earlier ones."
                ' Synchronise more often, lower the learning rate, or use consensus="average".',
            )
