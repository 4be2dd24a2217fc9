"""The expected sync rate of each trigger."""

import pytest

from lightning_curvadion import CommunicationBudget, DriftThreshold, EveryNSteps, IntegratedRMMC, RMMCThreshold
from lightning_curvadion.cli.errors import PlanError
from lightning_curvadion.cli.plan.sync_rate import choose_sync_rate, expected_sync_rate
from lightning_curvadion.optim.triggers import LocalStepCap


def test_a_trigger_is_simulated():
    rates = {
        trigger: expected_sync_rate(LocalStepCap(trigger, 50))
        for trigger in (EveryNSteps(5), CommunicationBudget(0.1), IntegratedRMMC(0.45), RMMCThreshold(10.0))
    }
    # The third is what the comparison measured for the default. RMMC never exceeds the fourth, so only the cap fires.
    assert list(rates.values()) == pytest.approx([0.2, 0.1, 0.174, 1 / 51], rel=0.05)


def test_the_rate_of_a_drift_has_to_be_given():
    cap = LocalStepCap(DriftThreshold(0.02), 50)
    with pytest.raises(PlanError, match=r"how often DriftThreshold fires.*--sync-rate, or the logs of a run"):
        choose_sync_rate(cap, given=None, run=None)
    assert choose_sync_rate(cap, given=0.1, run=None) == (0.1, "from --sync-rate")
