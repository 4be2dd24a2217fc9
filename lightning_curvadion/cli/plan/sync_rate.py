"""The sync rate of a planned run: given, taken from the logs of a run, or expected from its trigger."""

import copy
import math
import random
import statistics
from pathlib import Path

from ...optim.triggers import LocalStepCap
from ..errors import PlanError
from ..report.log_readers import read_run

# Mean and standard deviation of ln RMMC over the second half of the main job, where it no longer changes:
#   python -m lightning_curvadion fit --config configs/byte_gpt.yaml --trainer.log_every_n_steps=1
#   python -m lightning_curvadion plan --run lightning_logs/version_0 --config configs/byte_gpt.yaml --link 1Gbit ...
LOG_RMMC_MEAN, LOG_RMMC_STD = -2.54, 0.48
# RMMC of that size times these has the simulated defaults synchronise as rarely and as often as any measured job with
# them, which trainer/advice.py has.
RMMC_FACTORS = (0.54, 6.2)
_SIMULATED_STEPS = 20_000


def expected_sync_rate(
    cap: LocalStepCap, rmmc_factor: float = 1.0, log_rmmc_mean: float = LOG_RMMC_MEAN, overlap: int = 0
) -> float:
    """Simulate a trigger: the share of the steps at which it fires, with log-normal RMMC as in the main job.

    Args:
        cap: The optimizer's trigger with its bound on local steps. A copy of it is simulated.
        rmmc_factor: Factor on RMMC.
        log_rmmc_mean: Mean of ln RMMC.
        overlap: How many steps a mean may take, in which no other begins.

    Example:
        >>> from lightning_curvadion import EveryNSteps, RMMCThreshold
        >>> expected_sync_rate(LocalStepCap(EveryNSteps(4), max_local_steps=50))
        0.25
        >>> expected_sync_rate(LocalStepCap(RMMCThreshold(1e9), max_local_steps=9))
        0.1
        >>> expected_sync_rate(LocalStepCap(EveryNSteps(4), max_local_steps=50), overlap=5)
        0.2
    """
    cap = copy.deepcopy(cap)
    generator = random.Random(0)
    fired = since_sync = 0
    for _ in range(_SIMULATED_STEPS):
        since_sync += 1
        rmmc = rmmc_factor * generator.lognormvariate(log_rmmc_mean, LOG_RMMC_STD)
        if cap.decide(rmmc, may_sync=since_sync >= overlap):
            fired, since_sync = fired + 1, 0
    return fired / _SIMULATED_STEPS


def choose_sync_rates(
    cap: LocalStepCap, given: float | None, run: Path | None, overlap: int = 0
) -> tuple[tuple[float, ...], str]:
    """The sync rates to plan with, one or the ends of a range, and their source in words.

    Args:
        cap: The optimizer's trigger with its bound on local steps.
        given: The user's rate, which comes first.
        run: Logs of a run, which come second.
        overlap: As for :func:`expected_sync_rate`.

    Raises:
        PlanError: The logs hold no sync rate, or the trigger fires by what no simulation knows.
        ReportError: There are no logs.

    Example:
        >>> from lightning_curvadion import EveryNSteps, IntegratedRMMC
        >>> choose_sync_rates(LocalStepCap(EveryNSteps(4), max_local_steps=50), given=None, run=None)
        ((0.25,), 'EveryNSteps, for any RMMC')
        >>> rates, _ = choose_sync_rates(LocalStepCap(IntegratedRMMC(0.45), max_local_steps=50), given=None, run=None)
        >>> [round(rate, 2) for rate in rates]
        [0.1, 0.69]
    """
    if given is not None:
        return (given,), "from --sync-rate"
    if run is not None:
        rate, source = logged_sync_rate(run)
        return (rate,), source
    trigger = type(cap.trigger).__name__
    if cap.trigger.watches_drift:
        raise PlanError(
            f"how often {trigger} fires depends on how far the replicas move, which only training shows: give"
            " --sync-rate, or the logs of a run with --run"
        )
    low, high = (expected_sync_rate(cap, factor, overlap=overlap) for factor in RMMC_FACTORS)
    if high - low < 0.05 * low:
        return (expected_sync_rate(cap, overlap=overlap),), f"{trigger}, for any RMMC"
    return (low, high), f"{trigger}, with RMMC as small and as large as in any job measured so far; or give --sync-rate"


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
