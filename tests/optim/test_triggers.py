"""When to synchronise."""

import math

import pytest
import torch

from lightning_curvadion import (
    CommunicationBudget,
    CurvaDion,
    DriftThreshold,
    EveryNSteps,
    IntegratedRMMC,
    RMMCThreshold,
)
from lightning_curvadion.optim.triggers import LocalStepCap, Trigger


def decisions(trigger, signals, cap=None):
    capped = LocalStepCap(trigger, cap)
    return [capped.decide(signal) for signal in signals]


def test_threshold_fires_above_tau_and_not_at_it():
    assert decisions(RMMCThreshold(0.5), [math.inf, 0.5, 0.51, 0.0]) == [True, False, True, False]


def test_integrated_spends_a_budget_and_starts_anew():
    assert decisions(IntegratedRMMC(1.0), [math.inf, 0.6, 0.4, 0.1, 0.9, 0.2]) == [
        True,
        False,
        False,
        True,
        False,
        True,
    ]


def test_every_n_steps():
    assert decisions(EveryNSteps(3), [math.inf] * 7) == [False, False, True, False, False, True, False]
    assert decisions(EveryNSteps(1), [0.0] * 3) == [True] * 3


@pytest.mark.parametrize("fraction", [0.05, 0.25, 0.7, 1.0])
def test_communication_budget_keeps_its_share_while_rmmc_sinks_by_decades(fraction):
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(3000, generator=generator).tolist()
    signals = [math.inf] + [0.3 * 0.998**step * (0.5 + x) for step, x in enumerate(noise)]
    synced = decisions(CommunicationBudget(fraction), signals)
    assert sum(synced) / len(synced) == pytest.approx(fraction, abs=0.02)
    assert sum(synced[-1000:]) / 1000 == pytest.approx(fraction, abs=0.04)


def test_communication_budget_survives_a_momentum_that_does_not_change():
    synced = decisions(CommunicationBudget(0.5), [0.1] * 20 + [0.0] * 1000 + [0.1] * 800)
    assert sum(synced[-200:]) == pytest.approx(100, abs=20)


def weighed_decisions(trigger, drifts, lrs):
    """What a single replica would decide of its own drifts."""
    capped = LocalStepCap(trigger, None)
    return [
        capped.decide(math.inf, drift * trigger.drift_factor(lr), lr) for drift, lr in zip(drifts, lrs, strict=True)
    ]


def test_drift_fires_above_tau_and_not_at_it_whatever_the_rmmc():
    assert weighed_decisions(DriftThreshold(0.5), [0.0, 0.5, 0.51, 0.0], [1.0] * 4) == [False, False, True, False]


def test_the_bound_on_the_drift_follows_the_learning_rate_below_its_largest_value():
    lrs = [0.0, 0.1, 0.2, 0.1, 0.0, 0.0]
    # A warmup leaves the bound at tau; later it falls. Nothing moves at a learning rate of zero.
    assert weighed_decisions(DriftThreshold(0.5), [0.0, 0.4, 0.4, 0.3, 1e-9, 0.0], lrs) == [
        False,
        False,
        False,
        True,
        True,
        False,
    ]


def test_the_factor_on_the_drift_changes_no_state():
    trigger = DriftThreshold(0.5)
    trigger.observe(0.1, lr=0.2)
    assert trigger.drift_factor(0.4) == 1.0 and trigger.drift_factor(0.1) == 2.0
    assert trigger.state_dict() == {"type": "DriftThreshold", "largest_lr": 0.2}


class OwnTrigger(Trigger):
    """A user's, which knows RMMC alone."""

    def wants_sync(self, rmmc):
        return rmmc > 0.5


def test_a_trigger_that_watches_no_drift_is_not_told_of_it(monkeypatch):
    monkeypatch.setattr(Trigger, "observe", lambda *_: pytest.fail("observed"))
    assert [LocalStepCap(OwnTrigger(), None).decide(rmmc, 0.9, 0.1) for rmmc in (0.4, 0.6)] == [False, True]


@pytest.mark.parametrize(
    "trigger",
    [RMMCThreshold(1.0), IntegratedRMMC(1e9), EveryNSteps(1000), CommunicationBudget(1e-6), DriftThreshold(1.0)],
)
def test_the_cap_bounds_the_run_of_local_steps(trigger):
    synced = decisions(trigger, [0.001 * 0.9**step for step in range(12)], cap=3)
    assert synced == [False, False, False, True] * 3


def test_a_forced_sync_also_starts_a_new_sum_and_a_new_period():
    assert decisions(IntegratedRMMC(1.0), [0.4, 0.4, 0.4, 0.4, 0.4], cap=1) == [False, True, False, True, False]


@pytest.mark.parametrize(
    "make",
    [lambda: RMMCThreshold(0.3), lambda: IntegratedRMMC(0.7), lambda: EveryNSteps(4), lambda: CommunicationBudget(0.3)],
)
def test_state_survives_a_state_dict_round_trip_of_the_optimizer(make, tmp_path):
    signals = torch.rand(40, generator=torch.Generator().manual_seed(0)).mul(0.6).tolist()

    def optimizer():
        return CurvaDion([torch.nn.Parameter(torch.zeros(2, 2))], trigger=make(), max_local_steps=6)

    first, second = optimizer(), optimizer()
    for signal in signals[:18]:
        first._cap.decide(signal)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    rest = [[o._cap.decide(signal) for signal in signals[18:]] for o in (first, second)]
    assert rest[0] == rest[1]
    fresh = optimizer()
    assert [fresh._cap.decide(signal) for signal in signals[18:]] != rest[0] or isinstance(make(), RMMCThreshold)


def test_the_largest_learning_rate_survives_a_state_dict_round_trip(tmp_path):
    def optimizer():
        return CurvaDion([torch.nn.Parameter(torch.zeros(2, 2))], trigger=DriftThreshold(0.5))

    first, second = optimizer(), optimizer()
    first._cap.decide(0.0, drift=0.1, lr=0.4)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [o.trigger.drift_factor(0.1) for o in (first, second, optimizer())] == [4.0, 4.0, 1.0]


def test_the_state_of_another_trigger_is_left_out_with_a_warning():
    old = CurvaDion([torch.nn.Parameter(torch.zeros(2, 2))], trigger=EveryNSteps(4))
    new = CurvaDion([torch.nn.Parameter(torch.zeros(2, 2))], trigger=IntegratedRMMC(0.7))
    with pytest.warns(UserWarning, match="EveryNSteps; IntegratedRMMC starts afresh"):
        new.load_state_dict(old.state_dict())
    assert new.trigger.spent == 0.0


def test_an_optimizer_copies_its_trigger():
    shared = EveryNSteps(2)
    first, second = (CurvaDion([torch.nn.Parameter(torch.zeros(2, 2))], trigger=shared) for _ in range(2))
    assert [o._cap.decide(0.0) for o in (first, second)] == [False, False]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RMMCThreshold(-0.1), "tau must be >= 0"),
        (lambda: RMMCThreshold(float("nan")), "tau must be >= 0"),
        (lambda: IntegratedRMMC(0), "budget must be > 0.*EveryNSteps"),
        (lambda: DriftThreshold(0), "tau must be > 0.*EveryNSteps"),
        (lambda: DriftThreshold(float("nan")), "tau must be > 0.*EveryNSteps"),
        (lambda: EveryNSteps(0), "n must be an integer >= 1"),
        (lambda: EveryNSteps(2.5), "n must be an integer >= 1"),
        (lambda: CommunicationBudget(0), r"fraction must be in \(0, 1\]"),
        (lambda: CommunicationBudget(1.1), r"fraction must be in \(0, 1\]"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
