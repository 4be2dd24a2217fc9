"""A parameter of more than two dimensions steps as the matrices that it holds would step alone."""

import copy

import pytest
import torch
from models import equal, exact_sync, matrix, state_of
from torch import nn

from lightning_curvadion import CurvaDion, EveryNSteps
from lightning_curvadion.optim import dion, rmmc

UPDATES = [{"local_update": "muon"}, {"local_update": "dion", "rank_fraction": 0.5}]
UPDATES += [{"local_update": "sgd", "local_lr": 0.1}]


def train(optimizer, parameters, steps=4, seed=0, **hook):
    """Take steps; the gradients are those of a flat vector, whatever the shapes of the parameters."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        flat = torch.randn(sum(p.numel() for p in parameters), generator=generator)
        for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            # One without a gradient, which counts as zero.
            p.grad = None if step == 2 else torch.empty_like(p).copy_(gradient.view(p.shape))
        optimizer.step()


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


# -- packed matrices ---------------------------------------------------------------------------------------------------

# Where three matrices lie in a parameter, the dimension along which they do, and its shape.
PACKED = {
    "rows": ({"packed": 3}, 0, (18, 4)),
    "wide rows": ({"packed": 3}, 0, (12, 6)),
    "columns": ({"packed": 3, "transposed": True}, 1, (4, 18)),
    "wide columns": ({"packed": 3, "transposed": True}, 1, (4, 21)),
    "experts": ({"packed": 3}, 1, (2, 18, 4)),
    "kernels": ({"packed": 3, "flatten": True}, 0, (6, 4, 3, 3)),
    "transposed kernels": ({"packed": 3, "flatten": True, "transposed": True}, 1, (4, 6, 3, 3)),
}


class Pair:
    """A packed parameter, two of them in a group, beside its matrices as parameters of their own."""

    def __init__(self, layout, layout_of_memory=torch.contiguous_format, trigger=None, **update):
        self.options, self.dim, shape = PACKED[layout]
        whole = {**self.options, "packed": 1}
        torch.manual_seed(0)
        starts = [torch.randn(shape) for _ in range(2)]
        self.packed = [nn.Parameter(s.clone(memory_format=layout_of_memory)) for s in starts]
        self.parts = [[nn.Parameter(c.clone(memory_format=layout_of_memory)) for c in self.split(s)] for s in starts]
        self.alone = [part for parts in self.parts for part in parts]
        self.optimizer = CurvaDion([{"params": self.packed, **self.options}], trigger=trigger, **update)
        self.other = CurvaDion([{"params": self.alone, **whole}], trigger=trigger, **update)
        self.optimizer.init_state()
        self.other.init_state()
        for parameter, parts in zip(self.packed, self.parts, strict=True):
            # The matrices are counted by the last dimension of the batch.
            for Q, part in zip(self.optimizer.state[parameter]["Q"].unbind(-3), parts, strict=True):
                self.other.state[part]["Q"].copy_(Q)

    def split(self, tensor):
        return tensor.chunk(3, dim=self.dim)

    def train(self, steps=4, seed=0):
        generator = torch.Generator().manual_seed(seed)
        for step in range(steps):
            for parameter, parts in zip(self.packed, self.parts, strict=True):
                gradient = torch.randn(parameter.shape, generator=generator)
                # One without a gradient, which counts as zero.
                parameter.grad = None if step == 2 else gradient.clone()
                for part, own in zip(parts, self.split(gradient), strict=True):
                    part.grad = None if step == 2 else own.contiguous()
            self.optimizer.step()
            self.other.step()

    def apart(self):
        """The largest relative difference of parameters and state."""
        pairs = []
        for parameter, parts in zip(self.packed, self.parts, strict=True):
            state, others = self.optimizer.state[parameter], [self.other.state[part] for part in parts]
            assert state["momentum"].shape == parameter.shape
            pairs += [(parameter, torch.cat(parts, dim=self.dim))]
            pairs += [(state["momentum"], torch.cat([other["momentum"] for other in others], dim=self.dim))]
            pairs += [(state["Q"], torch.stack([other["Q"] for other in others], dim=-3))]
            pairs += [(state["norm"], torch.stack([other["norm"] for other in others], dim=-1))]
        return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


@pytest.mark.parametrize("layout", PACKED)
@pytest.mark.parametrize("update", UPDATES, ids=lambda update: update["local_update"])
@pytest.mark.parametrize("large", [False, True])
def test_packed_matrices_step_like_parameters_of_their_own(layout, update, large, monkeypatch):
    if large:
        monkeypatch.setattr(dion, "_LARGE", 1)
        # And a momentum in several pieces.
        monkeypatch.setattr(rmmc, "_BUFFER_ELEMENTS", 16)
    memory = torch.channels_last if "kernels" in layout and large else torch.contiguous_format
    pair = Pair(layout, memory, **update)
    start = [p.detach().clone() for p in pair.packed]
    pair.train()
    assert pair.apart() < 1e-6
    assert not any(torch.equal(a, b) for a, b in zip(pair.packed, start, strict=True))
    assert pair.optimizer.last_step.rmmc == pytest.approx(pair.other.last_step.rmmc, rel=1e-5)


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_packed_matrices_step_otherwise_than_one_matrix(layout):
    pair = Pair(layout)
    whole = [nn.Parameter(p.detach().clone()) for p in pair.packed]
    other = CurvaDion([{"params": whole, **pair.options, "packed": 1}])
    pair.train(steps=1)
    for p, packed in zip(whole, pair.packed, strict=True):
        p.grad = packed.grad.clone()
    other.step()
    assert not torch.allclose(whole[0], pair.packed[0], rtol=1e-3)


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_rmmc_watches_each_packed_matrix(layout):
    options, dim, _ = PACKED[layout]
    parameter = nn.Parameter(torch.zeros((6, 2) if dim == 0 else (2, 6)))
    optimizer = CurvaDion([{"params": [parameter], **options}])
    # Momenta of 1, then 0.95 + these: of the whole, the norm would change by less.
    for gradients in ((1.0, 1.0, 1.0), (0.1, 0.5, 0.2)):
        parameter.grad = torch.cat([torch.full((2, 2), gradient) for gradient in gradients], dim=dim)
        optimizer.step()
    assert optimizer.rmmc_by_parameter() == {"parameter 0 of group 0": pytest.approx(0.45, rel=1e-5)}


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("update", UPDATES[:2], ids=lambda update: update["local_update"])
def test_a_state_of_packed_matrices_continues_bit_for_bit(layout, update, tmp_path):
    pair, again = Pair(layout, **update), Pair(layout, **update)
    pair.train()
    torch.save(pair.optimizer.state_dict(), tmp_path / "state.pt")
    again.optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    with torch.no_grad():
        torch._foreach_copy_([*again.packed, *again.alone], [*pair.packed, *pair.alone])
    pair.train(seed=1)
    again.train(seed=1)
    assert equal(state_of(pair.optimizer), state_of(again.optimizer))


def test_a_state_from_before_the_option_continues_with_whole_matrices():
    _, _, shape = PACKED["rows"]
    torch.manual_seed(0)
    before, now = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))
    optimizer, other = CurvaDion([before]), CurvaDion([{"params": [now], "packed": 3}])
    train(optimizer, [before])
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["packed"]
    other.load_state_dict(saved)
    assert other.param_groups[0]["packed"] == 1
    with torch.no_grad():
        now.copy_(before)
    train(optimizer, [before], seed=1)
    train(other, [now], seed=1)
    assert torch.equal(before, now)


def test_a_state_whose_factors_are_of_other_matrices_is_an_error():
    parameter = nn.Parameter(torch.randn(18, 4))
    optimizer = CurvaDion([("qkv", parameter)])
    train(optimizer, [parameter])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["packed"] = 3
    with pytest.raises(
        ValueError, match=r"qkv is of other matrices: with flatten=False, .*packed=3 .* \(3, 4\), not \(4,\)"
    ):
        optimizer.load_state_dict(saved)


# -- several replicas -------------------------------------------------------------------------------------------------

HOOKS = [
    {"momentum": "displacement"},
    {"momentum": "local"},
    {"momentum": "average"},
    {"momentum": "factors"},
    {"momentum": "factors", "sync_rank_fraction": 0.25},
    {"consensus": "factors"},
    {"consensus": "none"},
]


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


def ends_of_packed_matrices(rank, world):
    """How far packed parameters end from their matrices, for every way to synchronise."""
    ends = []
    for layout in ("rows", "columns"):
        for update in UPDATES[:2]:
            for hook in HOOKS:
                pair = Pair(layout, trigger=EveryNSteps(2), **update)
                for one in (pair.optimizer, pair.other):
                    one.register_sync_hook(exact_sync(**hook))
                pair.train(steps=5, seed=rank)
                for one in (pair.optimizer, pair.other):
                    # Of local steps, so that it has something to do.
                    one.sync_hook.reach_consensus(one, include_state=True)
                together = [p.detach().clone() for p in pair.packed]
                states = [
                    pair.optimizer.state[p][name].clone() for p in pair.packed for name in ("momentum", "Q", "norm")
                ]
                ends.append(((layout, update, hook), pair.apart(), [*together, *states]))
    return ends


def test_replicas_synchronise_packed_matrices_like_parameters_of_their_own(replicas):
    for own, others in zip(*replicas.run(2, ends_of_packed_matrices, timeout=120), strict=True):
        assert max(own[1], others[1]) < 1e-5, own[0]
        assert all(torch.equal(a, b) for a, b in zip(own[2], others[2], strict=True)), own[0]


def saved_and_resumed(rank, world, folder, resume):
    """Packed parameters after a checkpoint of a consensus, and after more steps from it."""
    pairs = {}
    for layout in ("rows", "columns"):
        pair = Pair(layout, trigger=EveryNSteps(2))
        if resume:
            saved = torch.load(f"{folder}/{layout}.pt", weights_only=True)
            pair.optimizer.load_state_dict(saved["optimizer"])
            with torch.no_grad():
                torch._foreach_copy_(pair.packed, saved["parameters"])
        pair.optimizer.register_sync_hook(exact_sync(momentum="displacement"))
        start = [p.detach().clone() for p in pair.packed]
        pair.train(steps=3, seed=10 * resume + rank)
        pair.optimizer.sync_hook.reach_consensus(pair.optimizer, include_state=True)
        if rank == 0 and not resume:
            saved = {"parameters": [p.detach() for p in pair.packed], "optimizer": pair.optimizer.state_dict()}
            torch.save(saved, f"{folder}/{layout}.pt")
        pairs[layout] = start, [p.detach().clone() for p in pair.packed]
    return pairs


def test_packed_matrices_resume_on_another_number_of_replicas(replicas, tmp_path):
    ends = replicas.run(2, saved_and_resumed, str(tmp_path), False)[0]
    first, second, third = replicas.run(3, saved_and_resumed, str(tmp_path), True)
    for layout, (start, end) in first.items():
        assert equal(dict(enumerate(start)), dict(enumerate(ends[layout][1])))
        assert not torch.equal(start[0], end[0])
        for other in (second, third):
            assert equal(dict(enumerate(end)), dict(enumerate(other[layout][1])))
