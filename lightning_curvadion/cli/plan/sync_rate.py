"""The sync rate of a planned run: given, taken from the logs of a run, or expected from its trigger."""

import copy
import math
import random
import statistics
from pathlib import Path

from ...optim.triggers import LocalStepCap, RMMCThreshold
from ..errors import PlanError
from ..report.log_readers import read_run

# Mean and standard deviation of ln RMMC over the second half of the main job, where it no longer changes:
#   python -m lightning_curvadion fit --config configs/byte_gpt.yaml --trainer.log_every_n_steps=1
#   python -m lightning_curvadion plan --run lightning_logs/version_0 --config configs/byte_gpt.yaml --link 1Gbit ...
LOG_RMMC_MEAN, LOG_RMMC_STD = -2.54, 0.48
_SIMULATED_STEPS = 20_000


def expected_sync_rate(cap: LocalStepCap, rmmc_factor: float = 1.0, log_rmmc_mean: float = LOG_RMMC_MEAN) -> float:
    """Simulate a trigger: the share of the steps at which it fires, with log-normal RMMC as in the main job.

    Args:
        cap: The optimizer's trigger with its bound on local steps. A copy of it is simulated.
        rmmc_factor: Factor on RMMC.
        log_rmmc_mean: Mean of ln RMMC.

    Example:
        >>> from lightning_curvadion import EveryNSteps, RMMCThreshold
        >>> expected_sync_rate(LocalStepCap(EveryNSteps(4), max_local_steps=50))
        0.25
        >>> expected_sync_rate(LocalStepCap(RMMCThreshold(1e9), max_local_steps=9))
        0.1
    """
    cap = copy.deepcopy(cap)
    generator = random.Random(0)
    fired = 0
    for _ in range(_SIMULATED_STEPS):
        fired += cap.decide(rmmc_factor * generator.lognormvariate(log_rmmc_mean, LOG_RMMC_STD))
    return fired / _SIMULATED_STEPS


def choose_sync_rate(cap: LocalStepCap, given: float | None, run: Path | None) -> tuple[float, str]:
    """The sync rate to plan with, and its source in words.

    Args:
        cap: The optimizer's trigger with its bound on local steps.
        given: The user's rate, which comes first.
        run: Logs of a run, which come second.

    Raises:
        PlanError: The logs hold no sync rate, or the trigger fires by what no simulation knows.
        ReportError: There are no logs.

    Example:
        >>> from lightning_curvadion import EveryNSteps
        >>> choose_sync_rate(LocalStepCap(EveryNSteps(4), max_local_steps=50), given=None, run=None)
        (0.25, 'EveryNSteps, for any RMMC')
    """
    if given is not None:
        return given, "from --sync-rate"
    if run is not None:
        return logged_sync_rate(run)
    trigger = type(cap.trigger).__name__
    if cap.trigger.watches_drift:
        raise PlanError(
            f"how often {trigger} fires depends on how far the replicas move, which only training shows: give"
            " --sync-rate, or the logs of a run with --run"
        )
    rate, low, high = (expected_sync_rate(cap, factor) for factor in (1.0, 0.5, 2.0))
    if max(abs(low - rate), abs(high - rate)) < 0.05 * rate:
        return rate, f"{trigger}, for any RMMC"
    certainty = "a guess" if isinstance(cap.trigger, RMMCThreshold) else "expected"
    span = f"{100 * low:.0f} to {100 * high:.0f} %"
    return rate, f"{trigger}, {certainty} for RMMC as in configs/byte_gpt.yaml; {span} if RMMC is half or twice that"


def logged_sync_rate(folder: Path) -> tuple[float, str]:
    """The last sync rate in the logs of a run, and its source in words.

    Raises:
        PlanError: The logs hold no sync rate.
        ReportError: There are no logs.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "metrics.csv").write_text("curvadion/sync_rate,step\\n0.5,9\\n0.25,19\\n")
        ...     rate, source = logged_sync_rate(Path(folder))
        >>> rate, source.startswith("logged in 20 steps of")
        (0.25, True)
    """
    run = read_run(folder)
    rates = run.metric("sync_rate")
    if not rates:
        raise PlanError(f"{folder} has no curvadion/sync_rate: train with the callback CommunicationMonitor")
    source = f"logged in {rates.steps[-1] + 1} steps of {run.source}"
    log_rmmc = [math.log(value) for value in run.metric("rmmc").finite().values if value > 0]
    if late := log_rmmc[len(log_rmmc) // 2 :]:
        mean, std = statistics.mean(late), statistics.pstdev(late)
        source += f"; ln RMMC in its second half: mean {mean:.2f}, standard deviation {std:.2f}"
    return rates.last, source
