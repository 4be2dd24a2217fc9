"""Invariant 1: synchronising at every step without consensus is the reference Dion, on any number of ranks."""

import pytest
from golden import Golden, assert_follows, start_from

from lightning_curvadion import CurvaDion, EveryNSteps, ProcessGroupSync
from lightning_curvadion.optim import dion


@pytest.mark.parametrize("name", ["single_fullrank", "single_lowrank"])
def test_a_single_replica_follows_the_reference(name):
    golden = Golden(name)
    parameters = golden.parameters(0)
    optimizer = CurvaDion(parameters, **golden.options)
    start_from(optimizer, parameters, golden.tensors(0, "init", "Q"))
    assert_follows(golden, 0, optimizer, parameters)


@pytest.mark.parametrize("method", ["qr", "cholesky"])
@pytest.mark.parametrize("name", ["single_fullrank", "single_lowrank"])
def test_every_orthonormalisation_follows_the_reference(name, method, monkeypatch):
    by_default = dion.orthonormalize
    monkeypatch.setattr(dion, "orthonormalize", lambda Y: by_default(Y, method))
    test_a_single_replica_follows_the_reference(name)


def follow(rank, world, name, same_data):
    golden = Golden(name)
    source = 0 if same_data else rank
    parameters = golden.parameters(source)
    optimizer = CurvaDion(parameters, trigger=EveryNSteps(1), **golden.options)
    start_from(optimizer, parameters, golden.tensors(source, "init", "Q"))
    optimizer.register_sync_hook(ProcessGroupSync(consensus="none"))
    assert_follows(golden, source, optimizer, parameters)
    return optimizer.last_step.synced


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("name", ["single_fullrank", "single_lowrank"])
def test_ranks_with_the_same_gradients_follow_the_single_reference(replicas, world, name):
    assert all(replicas.run(world, follow, name, True))


def test_three_ranks_with_decoupled_momenta_follow_the_reference(replicas):
    assert all(replicas.run(3, follow, "ddp3_lowrank", False))
