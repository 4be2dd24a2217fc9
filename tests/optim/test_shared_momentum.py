"""The sync step: the norm that RMMC compares with is that of the momentum which replicas share."""

import statistics

import pytest
import torch
from torch import nn

from lightning_curvadion import CurvaDion, EveryNSteps, ProcessGroupSync

PERIOD = 10


def noisy_steps(rank, hook, steps, **options):
    """Steps on gradients of which half is noise of this replica; after each, the step and the optimizer."""
    parameters = [nn.Parameter(torch.zeros(40, 30)), nn.Parameter(torch.zeros(30, 40))]
    optimizer = CurvaDion(parameters, max_local_steps=None, **options)
    optimizer.register_sync_hook(ProcessGroupSync(**hook))
    common, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + rank)
    for step in range(steps):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=common) + torch.randn(p.shape, generator=own)
        optimizer.step()
        yield step, optimizer


def rmmc_of_steps(rank, world, hook, consensus_after):
    rmmc = []
    for step, optimizer in noisy_steps(rank, hook, 8 * PERIOD, trigger=EveryNSteps(PERIOD)):
        rmmc.append(optimizer.last_step.rmmc)
        if step in consensus_after:
            optimizer.sync_hook.reach_consensus(optimizer, include_state=True)
    return rmmc


def times_the_others(rmmc, steps):
    """RMMC of some steps over that of the others, once the momentum has settled."""
    settled = range(2 * PERIOD, len(rmmc))
    others = [rmmc[step] for step in settled if step not in steps]
    return statistics.mean(rmmc[step] for step in steps) / statistics.mean(others)


SHARING = [
    {"momentum": "factors"},
    {"momentum": "factors", "factor_format": "int4"},
    {"momentum": "factors", "sync_rank_fraction": 0.25},
    {"momentum": "average"},
]


@pytest.mark.parametrize("hook", SHARING, ids=str)
def test_a_sync_step_that_shares_momentum_is_no_bend_of_the_loss_surface(replicas, hook):
    rmmc, other = replicas.run(2, rmmc_of_steps, hook, ())
    assert rmmc == other
    # The noise of the replica grows back, so that it is more than at the other steps.
    assert times_the_others(rmmc, range(3 * PERIOD, 8 * PERIOD, PERIOD)) < 2.3


@pytest.mark.parametrize("hook", [SHARING[0], SHARING[2], {"momentum": "dion"}, {"momentum": "local"}], ids=str)
def test_a_consensus_of_the_state_is_no_bend_of_the_loss_surface(replicas, hook):
    after = range(2 * PERIOD + 4, 8 * PERIOD, PERIOD)
    rmmc, other = replicas.run(2, rmmc_of_steps, hook, [step - 1 for step in after])
    assert rmmc == other
    assert times_the_others(rmmc, after) < 1.35


def norms_after_sync(rank, world, hook, rank_fraction):
    """The stored norm of each matrix after a sync step whose error feedback leaves the momentum as it is."""
    options = {"trigger": EveryNSteps(4), "rank_fraction": rank_fraction, "mu": 0.9999999}
    *_, (_, optimizer) = noisy_steps(rank, hook, 4, **options)
    assert optimizer.last_step.synced
    return [(state["norm"].item(), state["momentum"].norm().item()) for state in optimizer.state.values()]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("rank_fraction", [0.5, 1.0])
@pytest.mark.parametrize("hook", SHARING, ids=str)
def test_the_stored_norm_is_that_of_the_shared_momentum(replicas, world, hook, rank_fraction):
    own = [norm for _, norm in replicas.run(1, norms_after_sync, {}, rank_fraction)[0]]
    for norms in replicas.run(world, norms_after_sync, hook, rank_fraction):
        for (stored, momentum), alone in zip(norms, own, strict=True):
            assert stored == pytest.approx(momentum, rel=1e-4)
            assert momentum < 0.97 * alone, "noise has cancelled"
