"""``examples/fabric.py``: a local step stays on its replica, and a consensus makes one model."""

import re

import pytest
import torch
from launching import ROOT, free_port, run_as_torchrun
from lightning.fabric import Fabric
from models import build, parameters_of
from replicas import counted_collectives
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import Member, same
from two_levels import groups_of

from examples.fabric import Unwrapped
from lightning_curvadion import CurvaDion, EveryNSteps, ProcessGroupSync, split_parameters


def step_under_fabric(rank, world):
    """Gradients and parameters after a local step, its collectives, and the parameters after a consensus."""
    fabric = Fabric(accelerator="cpu", devices=world, strategy=Unwrapped(), plugins=[Member(rank, world)])
    fabric.launch()
    net, _ = build()
    curvadion = CurvaDion(split_parameters(net), lr=0.02, trigger=EveryNSteps(3))
    model, optimizer = fabric.setup(net, curvadion)
    sync = ProcessGroupSync()
    with pytest.raises(ValueError, match=r"on the CurvaDion that you gave to fabric\.setup"):
        optimizer.register_sync_hook(sync)
    curvadion.register_sync_hook(sync)
    sync.include_module(net)
    tokens = torch.randint(0, 11, (24,), generator=torch.Generator().manual_seed(rank))
    with counted_collectives() as calls:
        fabric.backward(nn.functional.cross_entropy(model(tokens), tokens))
        optimizer.step()
    assert curvadion.last_step is not None and not curvadion.last_step.synced
    gradients = [parameter.grad.clone() for parameter in net.parameters()]
    local = parameters_of(net)
    sync.reach_consensus(curvadion, include_state=True)
    return list(calls), gradients, local, parameters_of(net)


def test_a_local_step_stays_on_its_replica(replicas):
    first, second = replicas.run(2, step_under_fabric)
    assert first[0] == [("all_to_all_single", 16)]
    for gradients_or_parameters in (1, 2):
        pairs = zip(first[gradients_or_parameters], second[gradients_or_parameters], strict=True)
        assert not any(torch.equal(a, b) for a, b in pairs)
    assert same(first[3], second[3]), "after the consensus"


def step_of_two_levels(rank, world):
    """Gradients and parameters after a local step of replicas of two processes."""
    fabric = Fabric(accelerator="cpu", devices=world, strategy=Unwrapped(), plugins=[Member(rank, world)])
    fabric.launch()
    group, inner_group = groups_of(world, 2)
    net, _ = build()
    curvadion = CurvaDion(split_parameters(net), lr=0.02, trigger=EveryNSteps(3))
    model, optimizer = fabric.setup(DistributedDataParallel(net, process_group=inner_group), curvadion)
    sync = ProcessGroupSync(group, inner_group=inner_group)
    curvadion.register_sync_hook(sync)
    sync.include_module(model.module)
    tokens = torch.randint(0, 11, (24,), generator=torch.Generator().manual_seed(rank))
    fabric.backward(nn.functional.cross_entropy(model(tokens), tokens))
    optimizer.step()
    gradients, local = [parameter.grad.clone() for parameter in net.parameters()], parameters_of(net)
    sync.reach_consensus(curvadion, include_state=True)
    return gradients, local, parameters_of(net)


def test_two_processes_of_a_replica_step_together_under_fabric(replicas):
    first, second, third, _ = replicas.run(4, step_of_two_levels)
    assert same(first[0], second[0]) and same(first[1], second[1])
    assert not same(first[1], third[1]) and same(first[2], third[2])


def test_the_script_trains_and_ends_with_one_model(replicas):
    printed, _ = replicas.run(2, run_as_torchrun, ROOT / "examples/fabric.py", free_port())
    first, last, synced, steps = re.search(r"loss (\S+) -> (\S+), (\d+) sync steps of (\d+)", printed).groups()
    assert float(last) < 0.5 * float(first) and 1 < int(synced) < int(steps)
    local, consensus = re.search(r"(\S+) after a local step, (\S+) after the consensus", printed).groups()
    assert float(local) > 0 and float(consensus) == 0
