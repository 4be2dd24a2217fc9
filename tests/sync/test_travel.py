"""The travel of displacements: the learning rates of the steps that made them."""

import pytest
import torch
from torch import nn

from lightning_curvadion import CurvaDion, ProcessGroupSync
from lightning_curvadion.sync.parameter_payloads import ParameterPayloads


@pytest.fixture
def stepped():
    """Payloads of a parameter that has taken two steps, of which one is on its way, and one since."""
    parameter = nn.Parameter(torch.ones(4, 4))
    optimizer = CurvaDion([parameter], lr=0.25)
    payloads = ParameterPayloads(ProcessGroupSync().settings)
    payloads.capture_anchors(optimizer)
    payloads.record_learning_rates(optimizer)
    payloads.of(optimizer, {"weight": parameter})
    payloads.record_learning_rates(optimizer)
    return payloads, optimizer, parameter


def in_the_next_group(payloads):
    later = ParameterPayloads(ProcessGroupSync().settings)
    later.resume(payloads)
    return later


def test_a_mean_that_is_given_up_leaves_the_travel_that_was_sent(stepped):
    payloads, _, parameter = stepped
    assert payloads._travel.of(parameter) == 0.25
    assert in_the_next_group(payloads)._travel.of(parameter) == 0.5


def test_a_mean_that_has_arrived_takes_the_travel_that_was_sent(stepped):
    payloads, optimizer, parameter = stepped
    payloads.arrived(optimizer)
    assert in_the_next_group(payloads)._travel.of(parameter) == 0.25
