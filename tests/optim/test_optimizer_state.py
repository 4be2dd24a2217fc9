"""State and groups of the optimizer: added, saved, loaded, copied and replaced."""

import copy
import pickle

import pytest
import torch
from models import build, equal, matrix, state_of, train_step, with_gradients
from torch import nn

from lightning_curvadion import CurvaDion, EveryNSteps, IntegratedRMMC


def test_add_param_group_with_and_without_names():
    model, optimizer = build()
    extra, named = matrix(), matrix()
    optimizer.add_param_group({"params": extra, "lr": 0.5})
    optimizer.add_param_group({"params": [("extra", named)], "lr": 0.5})
    assert [name for name, _ in optimizer.named_parameters()][-2:] == ["parameter 0 of group 5", "extra"]
    train_step(model, optimizer, 0, 0)
    with_gradients(extra, named)
    before = extra.detach().clone()
    optimizer.step()
    assert not torch.equal(before, extra)


def test_a_bad_group_is_not_added():
    optimizer = CurvaDion([matrix()])
    with pytest.raises(ValueError, match="shape"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert len(optimizer.param_groups) == 1


def test_state_dict_continues_bit_for_bit_and_holds_only_tensors_and_plain_numbers(tmp_path):
    model, optimizer = build(trigger=IntegratedRMMC(0.3))
    for step in range(4):
        train_step(model, optimizer, step, 0)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    other_model, other = build(trigger=IntegratedRMMC(0.3), seed=5)
    other_model.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    for step in range(4, 9):
        for m, o in ((model, optimizer), (other_model, other)):
            train_step(m, o, step, 0)
        assert optimizer.last_step == other.last_step
    assert equal(state_of(optimizer), state_of(other))


def test_bfloat16_keeps_its_float32_norm_through_a_state_dict():
    optimizer, other = (CurvaDion([matrix().to(torch.bfloat16).detach().requires_grad_()]) for _ in range(2))
    (parameter,), (twin,) = optimizer.param_groups[0]["params"], other.param_groups[0]["params"]
    with_gradients(parameter)
    optimizer.step()
    other.load_state_dict(optimizer.state_dict())
    norm = other.state[twin]["norm"]
    assert norm.dtype == torch.float32 and norm.item() == optimizer.state[parameter]["norm"].item()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_steps_like_the_original(duplicate):
    parameter = matrix()
    optimizer = CurvaDion([parameter], trigger=EveryNSteps(2))
    with_gradients(parameter)
    optimizer.step()
    twin = duplicate(optimizer)
    (copied,) = twin.param_groups[0]["params"]
    for step in range(1, 4):
        with_gradients(parameter, copied, seed=step)
        copied.grad.copy_(parameter.grad)
        optimizer.step()
        twin.step()
        assert torch.equal(parameter, copied) and twin.last_step == optimizer.last_step


def test_state_replaced_by_hand_is_used():
    parameter = matrix()
    optimizer = CurvaDion([parameter], mu=0.5, rank_fraction=1.0)
    with_gradients(parameter)
    optimizer.step()
    optimizer.state[parameter]["momentum"] = torch.ones(6, 4)
    parameter.grad = None
    optimizer.step()
    torch.testing.assert_close(optimizer.state[parameter]["momentum"], torch.full((6, 4), 0.5), rtol=1e-4, atol=1e-5)


def test_state_is_momentum_Q_and_one_number_a_matrix():
    parameter = matrix(32, 16)
    optimizer = CurvaDion([parameter], rank_fraction=0.25)
    optimizer.init_state()
    assert {name: tuple(value.shape) for name, value in optimizer.state[parameter].items()} == {
        "momentum": (32, 16),
        "Q": (16, 4),
        "norm": (),
    }
