"""Several matrices that lie packed in a parameter step as parameters of their own would."""

import copy

import pytest
import torch
from matrix_training import HOOKS, UPDATES, train
from models import equal, exact_sync, state_of
from torch import nn

from lightning_curvadion import CurvaDion, EveryNSteps
from lightning_curvadion.optim import dion, rmmc

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
