"""CurvaDion as a torch.optim.Optimizer, on one replica."""

import pytest
import torch
from models import build, equal, matrix, state_of, with_gradients

from lightning_curvadion import CurvaDion, EveryNSteps, RMMCThreshold


def test_closure_is_called_with_gradients_enabled_and_its_loss_returned():
    parameter = matrix()
    optimizer = CurvaDion([parameter])

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


def test_schedulers_set_the_learning_rate_of_the_next_step():
    parameter = matrix()
    optimizer = CurvaDion([parameter], lr=0.5, weight_decay=0.0, trigger=RMMCThreshold(0))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    sizes = []
    for step in range(3):
        before = parameter.detach().clone()
        with_gradients(parameter, seed=step)
        optimizer.step()
        scheduler.step()
        sizes.append((parameter.detach() - before).norm().item())
    assert sizes[1] == pytest.approx(0.1 * sizes[0], rel=0.05) and sizes[2] == pytest.approx(0.01 * sizes[0], rel=0.05)


def test_without_a_hook_nothing_is_sent_and_the_trigger_still_reports():
    parameter = matrix()
    optimizer = CurvaDion([parameter], trigger=EveryNSteps(2))
    reports = []
    for step in range(4):
        with_gradients(parameter, seed=step)
        optimizer.step()
        reports.append((optimizer.last_step.synced, optimizer.last_step.bytes_sent))
    assert reports == [(False, 0), (True, 0)] * 2


def test_phases_appear_by_name_in_a_trace():
    parameter = matrix()
    optimizer = CurvaDion([parameter])
    with_gradients(parameter)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        optimizer.step()
    assert {"curvadion::rmmc", "curvadion::local_step"} <= {event.key for event in trace.key_averages()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": -0.1}, "tau must be >= 0"),
        ({"tau": 0.1, "trigger": EveryNSteps(1)}, "tau and trigger exclude each other"),
        ({"trigger": "often"}, "trigger must be a trigger such as"),
        ({"max_local_steps": 0}, "max_local_steps must be an integer >= 1"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        CurvaDion([matrix()], **options)


@pytest.mark.parametrize("trigger", [EveryNSteps(1), EveryNSteps(10)], ids=["sync", "local"])
def test_a_step_within_autocast_is_the_step_without(trigger):
    states = []
    for enabled in (False, True):
        model, optimizer = build(trigger=trigger)
        for step in range(3):
            with_gradients(*model.parameters(), seed=step)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                optimizer.step()
        states.append(state_of(optimizer))
    assert equal(*states)
