"""A parameter of more than two dimensions steps as the matrices that it holds would step alone."""

import copy

import pytest
import torch
from matrix_training import HOOKS, UPDATES, train
from models import equal, exact_sync, matrix, state_of
from torch import nn

from lightning_curvadion import CurvaDion, EveryNSteps
from lightning_curvadion.optim import dion


def same_start(batch, optimizer, matrices, other):
    """Give matrices the right factors of the batch that holds them."""
    optimizer.init_state()
    other.init_state()
    for Q, parameter in zip(optimizer.state[batch]["Q"], matrices, strict=True):
        other.state[parameter]["Q"].copy_(Q)


@pytest.mark.parametrize("update", UPDATES, ids=lambda update: update["local_update"])
@pytest.mark.parametrize("shape", [(5, 6, 4), (5, 4, 6)])
def test_experts_step_bit_for_bit_like_as_many_matrices(shape, update):
    torch.manual_seed(0)
    experts = matrix(*shape)
    alone = [nn.Parameter(expert.detach().clone()) for expert in experts]
    optimizer, other = CurvaDion([experts], **update), CurvaDion(alone, **update)
    same_start(experts, optimizer, alone, other)
    train(optimizer, [experts])
    train(other, alone)
    assert torch.equal(experts, torch.stack(alone))
    for name in ("momentum", "Q", "norm"):
        assert torch.equal(optimizer.state[experts][name], torch.stack([other.state[p][name] for p in alone]))
    assert optimizer.last_step == other.last_step


def test_rmmc_of_a_parameter_is_the_largest_of_its_matrices():
    experts = nn.Parameter(torch.zeros(3, 2, 2))
    optimizer = CurvaDion([experts])
    # Momenta of 1, then 0.95 + these.
    for gradients in ((1.0, 1.0, 1.0), (0.1, 0.5, 0.2)):
        experts.grad = torch.tensor(gradients).view(3, 1, 1).expand(3, 2, 2)
        optimizer.step()
    assert optimizer.rmmc_by_parameter() == {"parameter 0 of group 0": pytest.approx(0.45, rel=1e-5)}


def test_a_batch_may_have_several_dimensions():
    torch.manual_seed(0)
    parameter = matrix(2, 3, 6, 4)
    flat = nn.Parameter(parameter.detach().flatten(0, 1).clone())
    optimizers = [CurvaDion([p]) for p in (parameter, flat)]
    for p, optimizer in zip((parameter, flat), optimizers, strict=True):
        train(optimizer, [p])
    assert torch.equal(parameter.flatten(0, 1), flat)
    assert optimizers[0].state[parameter]["norm"].shape == (2, 3)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("update", UPDATES, ids=lambda update: update["local_update"])
@pytest.mark.parametrize("large", [False, True])
def test_a_kernel_steps_bit_for_bit_like_its_flattened_matrix(layout, update, large, monkeypatch):
    if large:
        monkeypatch.setattr(dion, "_LARGE", 1)
    torch.manual_seed(0)
    start = torch.randn(6, 4, 3, 3)
    kernels = [nn.Parameter(s.clone(memory_format=layout)) for s in (start, 2 * start)]
    flat = [nn.Parameter(s.flatten(1).clone()) for s in (start, 2 * start)]
    optimizer = CurvaDion([{"params": kernels, "flatten": True}], **update)
    other = CurvaDion(flat, **update)
    train(optimizer, kernels)
    train(other, flat)
    for kernel, own in zip(kernels, flat, strict=True):
        assert torch.equal(kernel.flatten(1), own) and kernel.is_contiguous(memory_format=layout)
        assert torch.equal(optimizer.state[kernel]["momentum"].flatten(1), other.state[own]["momentum"])
        assert torch.equal(optimizer.state[kernel]["Q"], other.state[own]["Q"])
    assert not torch.equal(kernels[0], start)


@pytest.mark.parametrize("update", UPDATES[:2], ids=lambda update: update["local_update"])
def test_a_transposed_matrix_steps_like_its_transpose(update):
    torch.manual_seed(0)
    start = torch.randn(12, 4)
    plain, turned = nn.Parameter(start.clone()), nn.Parameter(start.mT.contiguous())
    optimizer, other = CurvaDion([plain], **update), CurvaDion([{"params": [turned], "transposed": True}], **update)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        plain.grad = torch.randn(12, 4, generator=generator)
        turned.grad = plain.grad.mT.contiguous()
        optimizer.step()
        other.step()
    torch.testing.assert_close(turned.mT, plain)


def test_state_has_the_shape_of_the_parameter_and_one_norm_a_matrix():
    kernel, experts = matrix(8, 3, 2, 2), matrix(5, 6, 4)
    optimizer = CurvaDion([{"params": [kernel], "flatten": True}, {"params": [experts]}], rank_fraction=0.5)
    optimizer.init_state()
    shapes = [{name: tuple(value.shape) for name, value in optimizer.state[p].items()} for p in (kernel, experts)]
    assert shapes[0] == {"momentum": (8, 3, 2, 2), "Q": (8, 4), "norm": ()}
    assert shapes[1] == {"momentum": (5, 6, 4), "Q": (5, 4, 2), "norm": (5,)}
    Q = optimizer.state[experts]["Q"]
    assert not torch.equal(Q[0], Q[1]), "every expert starts from a subspace of its own"


def test_a_state_continues_whatever_its_strides():
    def build():
        torch.manual_seed(0)
        kernel = nn.Parameter(torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last))
        experts = matrix(5, 6, 4)
        return [kernel, experts], CurvaDion([{"params": [kernel], "flatten": True}, {"params": [experts]}])

    (parameters, optimizer), (others, other) = build(), build()
    train(optimizer, parameters)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["momentum"] = saved["state"][0]["momentum"].to(memory_format=torch.channels_last)
    saved["state"][1]["momentum"] = saved["state"][1]["momentum"].mT.contiguous().mT
    other.load_state_dict(saved)
    with torch.no_grad():
        torch._foreach_copy_(others, parameters)
    train(optimizer, parameters, seed=1)
    train(other, others, seed=1)
    assert equal(state_of(optimizer), state_of(other))


def test_a_state_from_before_the_options_continues():
    def build():
        torch.manual_seed(0)
        return matrix(6, 4)

    parameter, twin = build(), build()
    optimizer, other = CurvaDion([parameter]), CurvaDion([twin])
    train(optimizer, [parameter])
    saved = copy.deepcopy(optimizer.state_dict())
    for option in ("flatten", "transposed", "packed", "lr_scale"):
        del saved["param_groups"][0][option]
    other.load_state_dict(saved)
    with torch.no_grad():
        twin.copy_(parameter)
    train(optimizer, [parameter], seed=1)
    train(other, [twin], seed=1)
    assert torch.equal(parameter, twin)


# -- several replicas -------------------------------------------------------------------------------------------------


def ends_of_a_batch_and_of_its_matrices(rank, world):
    """How far a batch and a kernel end from the matrices they hold, for every way to synchronise."""
    ends = []
    for update in UPDATES[:2]:
        for hook in HOOKS:
            torch.manual_seed(0)
            experts, start = matrix(3, 8, 6), torch.randn(6, 4, 3, 3)
            kernel = nn.Parameter(start.clone(memory_format=torch.channels_last))
            alone = [nn.Parameter(expert.detach().clone()) for expert in experts]
            flat = nn.Parameter(start.flatten(1))
            batched = [{"params": [experts]}, {"params": [kernel], "flatten": True}]
            optimizer = CurvaDion(batched, trigger=EveryNSteps(2), **update)
            other = CurvaDion([{"params": alone}, {"params": [flat]}], trigger=EveryNSteps(2), **update)
            same_start(experts, optimizer, alone, other)
            other.state[flat]["Q"].copy_(optimizer.state[kernel]["Q"])
            for one, members in ((optimizer, [experts, kernel]), (other, [*alone, flat])):
                one.register_sync_hook(exact_sync(**hook))
                train(one, members, steps=5, seed=rank)
                # Of local steps, so that it has something to do.
                one.sync_hook.reach_consensus(one, include_state=True)
            pairs = [(experts, torch.stack(alone)), (kernel.flatten(1), flat)]
            for name in ("momentum", "Q", "norm"):
                pairs.append((optimizer.state[experts][name], torch.stack([other.state[p][name] for p in alone])))
            pairs.append((optimizer.state[kernel]["norm"], other.state[flat]["norm"]))
            apart = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
            ends.append((update, hook, apart, [p.detach().clone() for p in (experts, kernel)]))
    return ends


def test_replicas_synchronise_a_batch_and_a_kernel_like_the_matrices_they_hold(replicas):
    for own, others in zip(*replicas.run(2, ends_of_a_batch_and_of_its_matrices), strict=True):
        # Momentum correction multiplies a batch at once, and rounds otherwise.
        assert max(own[2], others[2]) < 1e-5, own[:2]
        assert all(torch.equal(a, b) for a, b in zip(own[3], others[3], strict=True)), own[:2]
