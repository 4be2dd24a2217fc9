"""The outer step beside torch's SGD with Nesterov momentum."""

import pytest
import torch
import torch.distributed as dist
from models import build, exact_sync, parameters_of, train_step
from torch import nn

from lightning_curvadion import CurvaDion, EveryNSteps

NEVER = EveryNSteps(10**6)


def outer(rank, world, outer_lr, outer_momentum):
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(6, 4))
    optimizer = CurvaDion([parameter], trigger=EveryNSteps(2))
    optimizer.register_sync_hook(exact_sync(momentum="local", outer_lr=outer_lr, outer_momentum=outer_momentum))
    anchor = parameter.detach().clone()
    reference = nn.Parameter(anchor.clone())
    sgd = torch.optim.SGD([reference], lr=outer_lr, momentum=outer_momentum, nesterov=outer_momentum > 0)
    for step in range(6):
        alone = CurvaDion([nn.Parameter(parameter.detach().clone())], trigger=NEVER)
        alone.load_state_dict({**optimizer.state_dict(), "trigger": alone.state_dict()["trigger"]})
        (twin,) = alone.param_groups[0]["params"]
        parameter.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(10 * step + rank))
        twin.grad = parameter.grad.clone()
        alone.step()
        optimizer.step()
        if optimizer.last_step.synced:
            displacement = twin.detach() - reference.detach()
            dist.all_reduce(displacement)
            reference.grad = -displacement / world
            sgd.step()
            torch.testing.assert_close(parameter.detach(), reference.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("outer_lr", "outer_momentum"), [(0.7, 0.0), (0.7, 0.9), (1.0, 0.5)])
def test_the_outer_step_is_torchs_nesterov_sgd_on_the_averaged_displacement(replicas, outer_lr, outer_momentum):
    replicas.run(2, outer, outer_lr, outer_momentum)


def consensus_after_sync(rank, world):
    model, optimizer = build(hook={"outer_lr": 0.7, "outer_momentum": 0.9}, trigger=EveryNSteps(2))
    for step in range(4):
        train_step(model, optimizer, step, shard=rank)
    assert optimizer.last_step.synced
    before = parameters_of(model)
    for include_state in (False, True, True):
        optimizer.sync_hook.reach_consensus(optimizer, include_state)
    return all(torch.equal(a, b) for a, b in zip(before, parameters_of(model), strict=True))


def test_a_consensus_right_after_a_sync_step_takes_no_second_outer_step(replicas):
    assert replicas.run(2, consensus_after_sync) == [True, True]
