"""Momentum correction: the mean displacement brings the momenta of replicas together, and nothing is sent for it."""

import copy
from unittest.mock import patch

import pytest
import torch
from models import exact_sync, state_of
from torch import Tensor, nn

from lightning_curvadion import CurvaDion, EveryNSteps, ProcessGroupSync
from lightning_curvadion.optim import muon
from lightning_curvadion.optim.momentum_correction import Correction, correct_momenta_, root_of_gram

ADAMW = {"algorithm": "adamw", "betas": (0.9, 0.95), "eps": 1e-8}
LAYOUT = {"flatten": False, "transposed": False, "packed": 1, "lr_scale": "spectral"}
MUON = {"algorithm": "dion", "local_update": "muon", "eps": 1e-8, **LAYOUT}


# Muon's step has no use for it.
Q_OF_ONE = torch.zeros(1, 1)


def correct_momentum_(group, state, difference, travel, share):
    """Of one parameter, for which its difference stands here."""
    correct_momenta_(group, {difference: state}, {difference: Correction(difference, travel, share)})


def polar(M: Tensor) -> Tensor:
    U, _, V = torch.linalg.svd(M, full_matrices=False)
    return U @ V


def test_first_moments_behind_one_second_moment_become_their_mean():
    torch.manual_seed(0)
    moments, second = torch.randn(2, 7), torch.rand(7) + 0.1
    expected = moments.mean(dim=0)
    travel, step = 0.03, 5
    unbiased = moments / (1 - 0.9**step)
    displacements = -travel * unbiased / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
    for own, moment in zip(displacements, moments, strict=True):
        state = {"exp_avg": moment.clone(), "exp_avg_sq": second.clone(), "step": step}
        correct_momentum_(ADAMW, state, displacements.mean(dim=0) - own, travel, share=1.0)
        torch.testing.assert_close(state["exp_avg"], expected)
        assert torch.equal(state["exp_avg_sq"], second)


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_momenta_come_near_to_their_mean(shape):
    torch.manual_seed(0)
    common = torch.randn(shape)
    momenta = [common + 0.5 * torch.randn(shape) for _ in range(4)]
    mean = sum(momenta) / 4
    travel, scale = 0.1, (shape[0] / shape[1]) ** 0.5
    displacements = [-travel * scale * polar(M) for M in momenta]
    before, after = [], []
    for own, M in zip(displacements, momenta, strict=True):
        state = {"momentum": M.clone(), "Q": Q_OF_ONE, "norm": M.norm() / 0.95}
        correct_momentum_(MUON, state, sum(displacements) / 4 - own, travel, share=1.0)
        before.append((M - mean).norm())
        after.append((state["momentum"] - mean).norm())
        torch.testing.assert_close(state["norm"], state["momentum"].norm() / 0.95)
    assert sum(after) < 0.5 * sum(before)


def test_the_root_turns_a_step_back_into_its_momentum():
    torch.manual_seed(0)
    for M in (torch.randn(12, 5), torch.randn(5, 12)):
        root = root_of_gram(M, eps=1e-8)
        again = root @ polar(M) if M.shape[0] < M.shape[1] else polar(M) @ root
        assert (again - M).norm() < 0.3 * M.norm()
        torch.testing.assert_close(root, root.mT, rtol=1e-4, atol=1e-4)


def corrected(group, momentum, difference):
    norm = torch.ones(momentum.shape[:-2] if not group["flatten"] else ())
    state = {"momentum": momentum.clone(), "Q": Q_OF_ONE, "norm": norm}
    correct_momentum_(group, state, difference, travel=0.1, share=0.5)
    return state["momentum"], state["norm"]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(3, 12, 5), (3, 5, 12)])
def test_each_matrix_of_a_batch_is_corrected_as_if_it_were_alone(shape, transposed):
    torch.manual_seed(0)
    momenta, differences, group = torch.randn(shape), torch.randn(shape), MUON | {"transposed": transposed}
    alone = [corrected(group, *pair) for pair in zip(momenta, differences, strict=True)]
    for found, expected in zip(corrected(group, momenta, differences), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(expected))
    scaled, plain = (
        corrected(MUON | {"transposed": turned}, momenta, differences)[0] - momenta for turned in (True, False)
    )
    torch.testing.assert_close(scaled, plain * (shape[1] / shape[2]), rtol=1e-3, atol=1e-4)


def test_momenta_of_one_shape_are_corrected_together_as_each_alone():
    torch.manual_seed(0)
    for group, states in (
        (MUON, [{"momentum": torch.randn(9, 6), "Q": Q_OF_ONE, "norm": torch.tensor(1.0)} for _ in range(3)]),
        (ADAMW, [{"exp_avg": torch.randn(7), "exp_avg_sq": torch.rand(7), "step": step} for step in (1, 5, 0)]),
    ):
        corrections = [
            Correction(torch.randn(9, 6) if group is MUON else torch.randn(7), 0.1 * (i + 1), 0.5) for i in range(3)
        ]
        alone, together = copy.deepcopy(states), copy.deepcopy(states)
        for state, correction in zip(alone, corrections, strict=True):
            correct_momentum_(group, state, *correction)
        of = [correction.difference for correction in corrections]
        correct_momenta_(group, dict(zip(of, together, strict=True)), dict(zip(of, corrections, strict=True)))
        for one, other, before in zip(alone, together, states, strict=True):
            assert all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name])) for name in one)
            assert one.get("step") == 0 or not torch.equal(*(next(iter(s.values())) for s in (one, before)))


def test_a_kernel_is_corrected_like_its_flattened_matrix():
    torch.manual_seed(0)
    momentum, difference = torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last)
    kernel, norm = corrected(MUON | {"flatten": True}, momentum, difference)
    flat, flat_norm = corrected(MUON, momentum.flatten(1), difference.flatten(1))
    assert torch.equal(kernel.flatten(1), flat) and torch.equal(norm, flat_norm)
    assert not torch.equal(kernel, momentum)


@pytest.mark.parametrize("group", [MUON, ADAMW], ids=["muon", "adamw"])
def test_nothing_changes_without_a_difference_or_without_a_step(group):
    torch.manual_seed(0)
    state = {"momentum": torch.randn(4, 3), "Q": Q_OF_ONE, "norm": torch.tensor(2.0)}
    if group is ADAMW:
        state = {"exp_avg": torch.randn(4, 3), "exp_avg_sq": torch.rand(4, 3), "step": 3}
    before = {name: torch.as_tensor(value).clone() for name, value in state.items()}
    correct_momentum_(group, state, torch.zeros(4, 3), travel=0.1, share=1.0)
    correct_momentum_(group, state, torch.ones(4, 3), travel=0.0, share=1.0)
    assert all(torch.equal(torch.as_tensor(state[name]), value) for name, value in before.items())


def test_a_first_moment_that_has_had_no_gradient_stays_zero():
    state = {"exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3), "step": 0}
    correct_momentum_(ADAMW, state, torch.ones(3), travel=0.1, share=1.0)
    assert torch.equal(state["exp_avg"], torch.zeros(3))


def momenta_of_noisy_replicas(rank, world, hook):
    """Momenta right after a sync step, on gradients of which half is this replica's noise, and the bytes sent."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((40, 30), (30, 40), (50,))]
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "algorithm": "adamw"}]
    optimizer = CurvaDion(groups, trigger=EveryNSteps(5))
    optimizer.register_sync_hook(exact_sync(**hook))
    common, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + rank)
    for _ in range(50):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=common) + torch.randn(p.shape, generator=own)
        optimizer.step()
    assert optimizer.last_step.synced
    return state_of(optimizer), optimizer.sync_hook.bytes_sent


def apart(answers, name):
    """Variance of a momentum over the replicas, summed over the parameters."""
    keys = [key for key in answers[0][0] if key.endswith(f".{name}")]
    return sum(torch.stack([state[key] for state, _ in answers]).var(dim=0).sum() for key in keys)


@pytest.mark.parametrize("world", [2, 3])
def test_momenta_of_replicas_are_nearer_to_each_other_for_the_same_bytes(replicas, world):
    local, corrected = (
        replicas.run(world, momenta_of_noisy_replicas, {"momentum": momentum}) for momentum in ("local", "displacement")
    )
    assert apart(corrected, "momentum") < 0.6 * apart(local, "momentum")
    assert apart(corrected, "exp_avg") < 0.6 * apart(local, "exp_avg")
    assert corrected[0][1] == local[0][1]


def test_in_one_bit_matrices_alone_are_corrected(replicas):
    formats = {"wire_format": "sign", "vector_format": "sign"}
    hooks = [{"momentum": momentum, **formats} for momentum in ("local", "displacement")]
    local, corrected = (replicas.run(2, momenta_of_noisy_replicas, hook) for hook in hooks)
    assert apart(corrected, "momentum") < 0.9 * apart(local, "momentum")
    assert apart(corrected, "exp_avg") == apart(local, "exp_avg")
    assert corrected[0][1] == local[0][1]


def test_by_default_biases_are_corrected_since_they_travel_in_int8(replicas):
    local, corrected = (
        replicas.run(2, momenta_of_noisy_replicas, {"momentum": momentum, "wire_format": "sign"})
        for momentum in ("local", "displacement")
    )
    assert apart(corrected, "exp_avg") < 0.6 * apart(local, "exp_avg")


def lion_and_sgd(rank, world, momentum):
    torch.manual_seed(0)
    matrix, vector = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6))
    groups = [
        {"params": [matrix], "local_update": "sgd", "local_lr": 0.1},
        {"params": [vector], "algorithm": "lion"},
    ]
    optimizer = CurvaDion(groups, trigger=EveryNSteps(2))
    optimizer.register_sync_hook(ProcessGroupSync(wire_format="float32", momentum=momentum))
    generator = torch.Generator().manual_seed(rank)
    for _ in range(4):
        for parameter in (matrix, vector):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return state_of(optimizer)


def test_steps_that_are_no_record_of_a_momentum_correct_none(replicas):
    local, corrected = (replicas.run(2, lion_and_sgd, momentum) for momentum in ("local", "displacement"))
    for a, b in zip(local, corrected, strict=True):
        for key in ("parameter 0 of group 0.momentum", "parameter 0 of group 1.exp_avg"):
            torch.testing.assert_close(a[key], b[key])


def orthonormalisations(rank, world, overlap):
    """How many matrices each of some steps orthonormalises, with a sync at every third."""
    counts, newton_schulz = [], muon.newton_schulz
    optimizer = CurvaDion([nn.Parameter(torch.zeros(8, 6)) for _ in range(3)], trigger=EveryNSteps(3))
    optimizer.register_sync_hook(ProcessGroupSync(overlap=overlap))
    with patch.object(muon, "newton_schulz", lambda U, eps: counts.append(len(U)) or newton_schulz(U, eps)):
        by_step = []
        for step in range(9):
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = torch.randn(8, 6, generator=torch.Generator().manual_seed(10 * step + rank))
            optimizer.step()
            by_step.append((sum(counts), optimizer.last_step.synced))
            counts.clear()
    return by_step


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_correction_orthonormalises_nothing_that_the_step_has_not(replicas, overlap):
    by_step, _ = replicas.run(2, orthonormalisations, overlap)
    assert sum(synced for _, synced in by_step) >= 2
    assert {count for count, _ in by_step} == {3}
