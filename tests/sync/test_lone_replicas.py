"""Several ranks without a hook are told that they train apart; those whose gradients are averaged are not."""

import warnings

import pytest
import torch
from models import Net, build, train_step
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_curvadion import CurvaDion, ProcessGroupSync, split_parameters


def warnings_of_training(rank, world, kind):
    """The warnings of four steps and what the last one reports."""
    model, optimizer = build(hook={} if kind == "hook" else None)
    trained = model
    if kind == "ddp":
        trained = DistributedDataParallel(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4):
            train_step(trained, optimizer, step, rank)
    return [str(w.message) for w in caught if "register_sync_hook" in str(w.message)], optimizer.last_step


def test_ranks_without_a_hook_are_warned_once(replicas):
    (first, report), (second, _) = replicas.run(2, warnings_of_training, "alone")
    assert len(first) == 1 and second == [], "once, on rank 0"
    assert first[0].startswith("Call optimizer.register_sync_hook(ProcessGroupSync()) on every rank: CurvaDion has no")
    assert "the 2 processes sent nothing" in first[0]
    assert report.bytes_sent == 0


@pytest.mark.parametrize(("world", "kind"), [(2, "ddp"), (2, "hook"), (1, "alone")])
def test_nobody_else_is_warned(replicas, world, kind):
    assert all(messages == [] for messages, _ in replicas.run(world, warnings_of_training, kind))


def hook_beside_ddp(rank, world):
    model = nn.ModuleDict({"student": DistributedDataParallel(Net()), "head": nn.Linear(4, 4)})
    optimizer, sync = CurvaDion(split_parameters(model)), ProcessGroupSync()
    optimizer.register_sync_hook(sync)
    for module, name in ((model, "student"), (model["student"], "the module")):
        with pytest.raises(ValueError, match=f"leave DistributedDataParallel out: {name} is wrapped in it"):
            sync.include_module(module)
    sync.include_module(model["student"].module)
    return torch.distributed.get_rank()


def test_a_hook_refuses_a_module_that_averages_its_gradients_already(replicas):
    assert replicas.run(2, hook_beside_ddp) == [0, 1]
