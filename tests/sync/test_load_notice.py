"""A module that was included can be copied and saved, and forgets the hook with it."""

import copy
import io

import pytest
import torch
from models import build, exact_sync, train_step
from torch import nn

from lightning_curvadion import EveryNSteps
from lightning_curvadion.sync.load_notice import notify_of_loads


class Listener:
    def __init__(self) -> None:
        self.loaded = []

    def hear(self, parameters) -> None:
        self.loaded.append([tuple(parameter.shape) for parameter in parameters])


@pytest.fixture
def module():
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))


def test_each_part_that_is_loaded_tells_its_own_parameters(module):
    listener = Listener()
    notify_of_loads(module, listener.hear)
    module[1].load_state_dict(module[1].state_dict())
    assert listener.loaded == [[(4, 3), (4,)]]
    module.load_state_dict(module.state_dict())
    assert sorted(listener.loaded[1:]) == [[], [(3, 2), (3,)], [(4, 3), (4,)]]


def test_a_copy_and_a_saved_module_tell_nothing(module):
    listener = Listener()
    notify_of_loads(module, listener.hear)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        other.load_state_dict(module.state_dict())
    assert listener.loaded == []


def test_the_hooks_go_with_what_they_notify(module):
    listener = Listener()
    notify_of_loads(module, listener.hear)
    assert module[0]._load_state_dict_post_hooks
    del listener
    assert not any(part._load_state_dict_post_hooks for part in module.modules())


def of_two_optimizers(rank, world):
    """Which of two optimizers settles its parameters after those of one were loaded."""
    models, optimizers = zip(*(build(layers=layers, trigger=EveryNSteps(9)) for layers in (1, 2)), strict=True)
    sync = exact_sync()
    for optimizer in optimizers:
        optimizer.register_sync_hook(sync)
    sync.include_module(nn.ModuleList(models))
    settled = []
    for loaded in models:
        loaded.load_state_dict(loaded.state_dict())
        for model, optimizer in zip(models, optimizers, strict=True):
            train_step(model, optimizer, 0, shard=rank)
            settled.append(sync.agreement.agreed_to_settle)
    return settled, [name.partition(".")[0] for name in sync._untrained.parameters_outside()]


def test_only_the_optimizer_of_loaded_parameters_settles_them(replicas):
    assert replicas.run(2, of_two_optimizers) == [([True, False, False, True], [])] * 2
