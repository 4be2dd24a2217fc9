"""The expected sync rate of each trigger."""

import pytest

from lightning_curvadion import CommunicationBudget, EveryNSteps, IntegratedRMMC, RMMCThreshold
from lightning_curvadion.cli.plan.sync_rate import expected_sync_rate
from lightning_curvadion.optim.triggers import LocalStepCap


def test_a_trigger_is_simulated():
    rates = {
        trigger: expected_sync_rate(LocalStepCap(trigger, 50))
        for trigger in (EveryNSteps(5), CommunicationBudget(0.1), IntegratedRMMC(0.3), RMMCThreshold(10.0))
    }
    # The third is what the comparison measured for the default. RMMC never exceeds the fourth, so only the cap fires.
    assert list(rates.values()) == pytest.approx([0.2, 0.1, 0.233, 1 / 51], rel=0.05)
