"""CurvaDion as a torch.optim.Optimizer, on one replica."""

import copy
import pickle

import pytest
import torch
from models import build, equal, state_of, train_step
from torch import nn

from lightning_curvadion import CurvaDion, EveryNSteps, IntegratedRMMC, RMMCThreshold, split_parameters


def matrix(*shape):
    return nn.Parameter(torch.randn(shape or (6, 4)))


def with_gradients(*parameters, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    return parameters


# -- updates of vector groups -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3, "betas": (0.8, 0.99), "lr": 0.1, "eps": 1e-3}])
def test_adamw_groups_are_torchs_adamw(options):
    options = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.01, "eps": 1e-8, **options}
    ours, theirs = [nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(1))) for _ in range(2)]
    optimizers = [
        CurvaDion([{"params": [ours], "algorithm": "adamw"}], **options),
        torch.optim.AdamW([theirs], **options),
    ]
    for step in range(6):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            with_gradients(parameter, seed=step)
            if step == 3:
                parameter.grad = None
            optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_lion_groups_follow_the_papers_equations():
    parameter = nn.Parameter(torch.randn(5))
    optimizer = CurvaDion([{"params": [parameter], "algorithm": "lion"}], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    expected, momentum = parameter.detach().clone(), torch.zeros(5)
    for step in range(4):
        with_gradients(parameter, seed=step)
        optimizer.step()
        direction = (0.9 * momentum + 0.1 * parameter.grad).sign()
        expected = expected - 0.01 * (direction + 0.1 * expected)
        momentum = 0.99 * momentum + 0.01 * parameter.grad
        torch.testing.assert_close(parameter.detach(), expected)


# -- matrices ---------------------------------------------------------------------------------------------------------


def test_stacked_matrices_step_like_matrices_alone():
    torch.manual_seed(0)
    together = [matrix(6, 4) for _ in range(3)] + [matrix(4, 6) for _ in range(2)] + [matrix(5, 5)]
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    one = CurvaDion(together)
    many = [CurvaDion([p]) for p in alone]
    one.init_state()
    for p, q, optimizer in zip(together, alone, many, strict=True):
        optimizer.init_state()
        optimizer.state[q]["Q"].copy_(one.state[p]["Q"])
    for step in range(4):
        with_gradients(*together, seed=step)
        one.step()
        for p, q, optimizer in zip(together, alone, many, strict=True):
            q.grad = p.grad.clone()
            optimizer.step()
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_missing_gradient_counts_as_zero():
    torch.manual_seed(0)
    first, second = matrix(), matrix()
    second.data.copy_(first.data)
    optimizers = [CurvaDion([first]), CurvaDion([second])]
    for step in range(5):
        with_gradients(first, second, seed=step)
        second.grad.copy_(first.grad)
        if step in (1, 3):
            first.grad, second.grad = None, torch.zeros_like(second)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(first, second)


def test_the_sgd_local_update_is_the_papers_cheap_step():
    parameter = matrix()
    optimizer = CurvaDion(
        [parameter], local_update="sgd", local_lr=0.1, mu=0.9, rank_fraction=0.25, trigger=EveryNSteps(3)
    )
    momentum = torch.zeros(6, 4)
    for step in range(2):
        before = parameter.detach().clone()
        with_gradients(parameter, seed=step)
        optimizer.step()
        momentum = 0.9 * (momentum + parameter.grad)
        torch.testing.assert_close(parameter.detach(), before - 0.1 * parameter.grad)
        torch.testing.assert_close(optimizer.state[parameter]["momentum"], momentum)
    before = parameter.detach().clone()
    with_gradients(parameter, seed=2)
    optimizer.step()
    assert optimizer.last_step.synced
    update = torch.linalg.svdvals(parameter.detach() - before * (1 - 0.01 * 0.01))
    assert update[0] == pytest.approx(0.01 * (6 / 4) ** 0.5, rel=0.05), (
        "a sync step is a Dion step: an orthonormal update"
    )


def test_frozen_parameters_do_not_move_and_train_once_unfrozen():
    model, optimizer = build(weight_decay=0.1)
    frozen = model.up[0].weight, model.norm.weight
    for p in frozen:
        p.requires_grad_(False)
    before = [p.detach().clone() for p in frozen]
    for step in range(3):
        train_step(model, optimizer, step, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, frozen, strict=True))
    for p in frozen:
        p.requires_grad_(True)
    train_step(model, optimizer, 3, 0)
    assert not any(torch.equal(a, b) for a, b in zip(before, frozen, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_train(dtype):
    model, _ = build()
    model.to(dtype)
    optimizer = CurvaDion(split_parameters(model), lr=0.02)
    losses = []
    for step in range(30):
        tokens = torch.randint(0, 11, (64,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens), (3 * tokens + 1) % 11)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.dtype == dtype for p in model.parameters())


# -- the interface of torch.optim -------------------------------------------------------------------------------------


def test_closure_is_called_with_gradients_enabled_and_its_loss_returned():
    parameter = matrix()
    optimizer = CurvaDion([parameter])

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


def test_schedulers_set_the_learning_rate_of_the_next_step():
    parameter = matrix()
    optimizer = CurvaDion([parameter], lr=0.5, weight_decay=0.0, trigger=RMMCThreshold(0))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    sizes = []
    for step in range(3):
        before = parameter.detach().clone()
        with_gradients(parameter, seed=step)
        optimizer.step()
        scheduler.step()
        sizes.append((parameter.detach() - before).norm().item())
    assert sizes[1] == pytest.approx(0.1 * sizes[0], rel=0.05) and sizes[2] == pytest.approx(0.01 * sizes[0], rel=0.05)


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


def test_without_a_hook_nothing_is_sent_and_the_trigger_still_reports():
    parameter = matrix()
    optimizer = CurvaDion([parameter], trigger=EveryNSteps(2))
    reports = []
    for step in range(4):
        with_gradients(parameter, seed=step)
        optimizer.step()
        reports.append((optimizer.last_step.synced, optimizer.last_step.bytes_sent))
    assert reports == [(False, 0), (True, 0)] * 2


def test_phases_appear_by_name_in_a_trace():
    parameter = matrix()
    optimizer = CurvaDion([parameter])
    with_gradients(parameter)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        optimizer.step()
    assert {"curvadion::rmmc", "curvadion::local_step"} <= {event.key for event in trace.key_averages()}


@pytest.mark.gpu
def test_one_host_synchronisation_a_step_on_a_gpu():
    parameters = [nn.Parameter(torch.randn(64, 32, device="cuda")) for _ in range(4)]
    optimizer = CurvaDion(parameters)
    for step in range(3):
        for p in parameters:
            p.grad = torch.randn_like(p)
        if step == 2:
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.matrix_stacks()
            _, signal = optimizer._measure(optimizer.matrix_stacks())
            torch.cuda.set_sync_debug_mode("default")
            signal.tolist()
            if step == 2:
                torch.cuda.set_sync_debug_mode("error")
            optimizer._local_step(optimizer.matrix_stacks())
        finally:
            torch.cuda.set_sync_debug_mode("default")


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": -0.1}, "tau must be >= 0"),
        ({"tau": 0.1, "trigger": EveryNSteps(1)}, "tau and trigger exclude each other"),
        ({"trigger": "often"}, "trigger must be a trigger such as"),
        ({"max_local_steps": 0}, "max_local_steps must be an integer >= 1"),
        ({"rank_fraction": 0.0}, r"rank_fraction must be in \(0, 1\]"),
        ({"rank_fraction": 1.5}, r"rank_fraction must be in \(0, 1\]"),
        ({"mu": 1.0}, r"mu must be in \[0, 1\)"),
        ({"mu": -0.1}, r"mu must be in \[0, 1\)"),
        ({"lr": -1.0}, "lr must be a finite number >= 0"),
        ({"lr": float("nan")}, "lr must be a finite number >= 0"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"eps": -1.0}, "eps must be"),
        ({"betas": (0.9, 1.0)}, "betas must be"),
        ({"local_update": "sgd"}, 'local_update="sgd" needs local_lr'),
        ({"local_update": "sgd", "local_lr": -1.0}, "local_lr must be"),
        ({"local_update": "adam"}, "local_update must be one of 'dion', 'sgd', not 'adam'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        CurvaDion([matrix()], **options)


def test_bad_parameters():
    with pytest.raises(ValueError, match="empty parameter list"):
        CurvaDion([])
    with pytest.raises(ValueError, match="algorithm must be one of 'dion', 'adamw', 'lion', not 'muon'"):
        CurvaDion([{"params": [matrix()], "algorithm": "muon"}])
    with pytest.raises(ValueError, match=r'parameter 1 of group 0 has shape \(3,\), but algorithm="dion".*"adamw"'):
        CurvaDion([matrix(), nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match=r"bias has shape \(3,\)"):
        CurvaDion([("bias", nn.Parameter(torch.zeros(3)))])
    with pytest.raises(ValueError, match="complex64; only real"):
        CurvaDion([nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_changes_nothing(bad):
    model, optimizer = build()
    train_step(model, optimizer, 0, 0)
    before = state_of(optimizer)
    model.up[1].weight.grad[0, 0] = bad
    with pytest.raises(ValueError, match=r"rank 0: up\.1\.weight has a gradient that is not finite"):
        optimizer.step()
    assert equal(before, state_of(optimizer))


def test_a_sparse_gradient():
    embedding = nn.Embedding(5, 4, sparse=True)
    optimizer = CurvaDion([{"params": embedding.parameters(), "algorithm": "adamw"}])
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse gradient; build the embedding with sparse=False"):
        optimizer.step()
