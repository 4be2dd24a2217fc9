"""The methods of the comparison are what their names promise."""

import copy

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from examples.benchmarks.compare_plan import QUOTED
from examples.benchmarks.methods import DEFAULT, METHODS
from lightning_curvadion import CurvaDion, CurvaDionStrategy, split_parameters


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 6, bias=False)
        self.norm = nn.LayerNorm(6)


@pytest.mark.parametrize("name", [name for name in METHODS if name in QUOTED or "outer" in name or "authors" in name])
def test_methods_step_with_their_learning_rates(name):
    torch.manual_seed(0)
    net = Net()
    before = copy.deepcopy(net)
    inner = METHODS[name].inner
    optimizer = METHODS[name].optimizer(split_parameters(net), lr=0.5, vector_lr=0.25)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[net.body.weight] == 0.5
    assert rates[net.norm.weight] == 0.25
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    optimizer.step()
    # AdamW's first step is the rate in every coordinate; Dion's three (rank 1/2)
    # unit columns, Muon's singular values of about one.
    torch.testing.assert_close((net.norm.weight - before.norm.weight).abs(), torch.full((6,), rates[net.norm.weight]))
    moved = (net.body.weight - before.body.weight).norm().item()
    expected = {"adamw": 48**0.5, "muon": 6**0.5, "dion": (6 / 8 * 3) ** 0.5}[inner]
    assert moved == pytest.approx(0.5 * expected, rel=0.2 if inner == "muon" else 1e-3)


def test_methods_communicate_as_their_names_say():
    for name, method in METHODS.items():
        assert isinstance(method.strategy(), DDPStrategy)
        others = name.startswith("DDP") or name.startswith(("authors", "no communication"))
        assert isinstance(method.strategy(), CurvaDionStrategy) != others
    assert METHODS[DEFAULT].hook == {} and METHODS[DEFAULT].options == {}
    optimizer = METHODS["local SGD, H=30"].optimizer(split_parameters(Net()), lr=0.1, vector_lr=0.1)
    assert isinstance(optimizer, CurvaDion)
    assert [optimizer._cap.decide(1.0) for _ in range(60)].count(True) == 2
