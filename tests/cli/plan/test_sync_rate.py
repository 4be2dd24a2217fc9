"""The expected sync rate of each trigger."""

import pytest

from lightning_curvadion import CommunicationBudget, DriftThreshold, EveryNSteps, IntegratedRMMC, RMMCThreshold
from lightning_curvadion.cli.errors import PlanError
from lightning_curvadion.cli.plan.sync_rate import choose_sync_rates, expected_sync_rate
from lightning_curvadion.optim.triggers import LocalStepCap
from lightning_curvadion.trainer.advice import MEASURED_SYNC_RATES


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
        choose_sync_rates(cap, given=None, run=None)
    assert choose_sync_rates(cap, given=0.1, run=None) == ((0.1,), "from --sync-rate")


def test_the_range_of_the_defaults_is_what_was_measured():
    cap = LocalStepCap(IntegratedRMMC(0.45), 50)
    rates, _ = choose_sync_rates(cap, given=None, run=None)
    assert rates == pytest.approx(MEASURED_SYNC_RATES, abs=0.01)


def test_a_larger_budget_is_planned_with_fewer_syncs():
    usual, rarer = (choose_sync_rates(LocalStepCap(IntegratedRMMC(b), 50), None, None)[0] for b in (0.45, 0.9))
    assert rarer[0] < usual[0] and rarer[1] < usual[1]
