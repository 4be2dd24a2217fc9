"""Coded sync steps of a whole optimizer: residuals settled and saved, errors on every rank, and memory by the chunk."""

import math
import warnings

import pytest
import torch
import torch.distributed as dist
from models import build, equal, state_of, train_step
from torch import nn

from lightning_curvadion import CurvaDion, EveryNSteps, ProcessGroupSync
from lightning_curvadion.sync import quantization

CODED = [f for f in quantization.WIRE_FORMATS if f != "float32"]
SHAPES = {"tall": (40, 24), "wide": (24, 40), "vector": (50,)}


def with_given_gradients(rank, world, hook, steps, settle=True):
    """Train on gradients that do not depend on where the parameters are."""
    start = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=start)) for shape in SHAPES.values()]
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "algorithm": "adamw"}]
    optimizer = CurvaDion(groups, weight_decay=0.0, trigger=EveryNSteps(3))
    optimizer.register_sync_hook(ProcessGroupSync(momentum="local", **hook))
    generator = torch.Generator().manual_seed(1 + rank)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    kept = ["residual" in optimizer.state[p] for p in parameters]
    before = [p.detach().clone() for p in parameters]
    optimizer.sync_hook.reach_consensus(optimizer, include_state=settle)
    left = ["residual" in optimizer.state[p] for p in parameters]
    return [p.detach().clone() for p in parameters], before, kept, left


@pytest.mark.parametrize("wire_format", CODED)
@pytest.mark.parametrize(("world", "steps"), [(2, 12), (3, 13)])
def test_settled_parameters_are_those_of_a_run_in_float32(replicas, wire_format, world, steps):
    hook = {"wire_format": wire_format}
    answers = replicas.run(world, with_given_gradients, hook, steps)
    expected = replicas.run(world, with_given_gradients, {}, steps)[0][0]
    for settled, before, kept, left in answers:
        assert all(kept) and not any(left)
        torch.testing.assert_close(settled, expected, rtol=0, atol=2e-6)
        assert all(torch.equal(a, b) for a, b in zip(settled, answers[0][0], strict=True))
        assert not any(torch.allclose(a, b, rtol=0, atol=2e-6) for a, b in zip(before, expected, strict=True))


def test_a_consensus_for_validation_leaves_residuals_for_the_next_sync_step(replicas):
    for _, _, kept, left in replicas.run(2, with_given_gradients, {"wire_format": "int2"}, 13, False):
        assert all(kept) and all(left)


def frozen_since(rank, world):
    model, optimizer = build(hook={"wire_format": "int2", "momentum": "local"}, trigger=EveryNSteps(2))
    for step in range(4):
        train_step(model, optimizer, step, shard=rank)
    weight = model.up[0].weight
    kept = optimizer.state[weight]["residual"].clone()
    before = weight.detach().clone()
    weight.requires_grad_(False)
    train_step(model, optimizer, 4, shard=rank)
    optimizer.sync_hook.reach_consensus(optimizer, include_state=True)
    return before, kept, weight.detach().clone(), "residual" in optimizer.state[weight]


def test_what_was_kept_of_a_parameter_frozen_since_is_settled_too(replicas):
    answers = replicas.run(2, frozen_since)
    kept = sum(kept for _, kept, *_ in answers) / 2
    for before, _, settled, left in answers:
        assert not left and kept.abs().max() > 0
        torch.testing.assert_close(settled, before + kept, rtol=0, atol=1e-6)


def resumed(rank, world, hook, settle, path):
    """Save right after a sync step, go on, and go on again from what was saved."""
    model, optimizer = build(hook=hook, trigger=EveryNSteps(3))

    def train(steps):
        for step in steps:
            train_step(model, optimizer, step, shard=rank)
        return state_of(optimizer)

    train(range(6))
    if settle:
        optimizer.sync_hook.reach_consensus(optimizer, include_state=True)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"{path}{rank}")
    once = train(range(6, 13))
    saved = torch.load(f"{path}{rank}", weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    residuals = ["residual" in state for state in saved["optimizer"]["state"].values()]
    return equal(once, train(range(6, 13))), residuals


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("wire_format", ["bfloat16", "int2"])
@pytest.mark.parametrize("residual_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("settle", [False, True])
def test_a_resumed_run_is_the_run_bit_for_bit(replicas, world, wire_format, residual_dtype, settle, tmp_path):
    hook = {"wire_format": wire_format, "residual_dtype": residual_dtype, "momentum": "local"}
    if not settle:
        hook["momentum"] = "average"  # the state of one rank is the state of all, residuals apart
    for same, residuals in replicas.run(world, resumed, hook, settle, str(tmp_path / "saved")):
        assert same
        assert not any(residuals) if settle else all(residuals)


# -- what momentum and displacements keep -----------------------------------------------------------------------------


def sums(rank, world, hook):
    """This replica's momentum and parameters around one sync step without gradients, decay and learning rate."""
    torch.manual_seed(rank)
    parameter = nn.Parameter(torch.zeros(60, 40))
    optimizer = CurvaDion([parameter], lr=0.1, mu=0.9999999, weight_decay=0.0, trigger=EveryNSteps(2))
    optimizer.register_sync_hook(ProcessGroupSync(**hook))
    parameter.grad = torch.randn(60, 40)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.0
    parameter.grad = None
    momentum, start = optimizer.state[parameter]["momentum"].clone(), parameter.detach().clone()
    optimizer.step()
    assert optimizer.last_step.synced
    return momentum, optimizer.state[parameter]["momentum"].clone(), start, parameter.detach().clone()


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("factor_format", ["float32", "int4", "sign"])
@pytest.mark.parametrize("thin", [None, 0.125])
def test_what_factors_do_not_carry_stays_in_the_momentum(replicas, world, factor_format, thin):
    hook = {"wire_format": "int2", "factor_format": factor_format, "sync_rank_fraction": thin}
    before, after, *_ = zip(*replicas.run(world, sums, hook), strict=True)
    torch.testing.assert_close(sum(before), sum(after), rtol=0, atol=1e-4)
    assert all((a - b).norm() > 0.02 * a.norm() for a, b in zip(before, after, strict=True)), "they did meet"


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("factor_format", ["float32", "int4", "sign"])
def test_what_factors_do_not_carry_stays_in_the_displacement(replicas, world, factor_format):
    hook = {"consensus": "factors", "momentum": "local", "wire_format": "int2", "factor_format": factor_format}
    *_, before, after = zip(*replicas.run(world, sums, hook), strict=True)
    torch.testing.assert_close(sum(before), sum(after), rtol=0, atol=1e-5)
    assert all((a - b).norm() > 0.02 * a.norm() for a, b in zip(before, after, strict=True)), "they did meet"


def final_momentum(rank, world, hook):
    model, optimizer = build(hook=hook, trigger=EveryNSteps(2))
    for step in range(2):
        train_step(model, optimizer, step, shard=rank)
    momenta = {key: value for key, value in state_of(optimizer).items() if key.endswith(".momentum")}
    return optimizer.last_step.bytes_sent, momenta


def test_thinner_factors_send_less_and_bring_momenta_less_close(replicas):
    sent, apart = {}, {}
    for fraction in (0.0625, 0.125, 0.25):
        (sent[fraction], a), (_, b) = replicas.run(2, final_momentum, {"sync_rank_fraction": fraction})
        apart[fraction] = math.sqrt(sum((a[key] - b[key]).square().sum().item() for key in a))
    assert sent[0.0625] < sent[0.125] < sent[0.25]
    assert apart[0.0625] > apart[0.125] > apart[0.25]


# -- errors -----------------------------------------------------------------------------------------------------------


def error_at_attach(rank, world, hooks, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False)).to(dtype)
    optimizer = CurvaDion([(name, p) for name, p in model.named_parameters()])
    try:
        optimizer.register_sync_hook(ProcessGroupSync(**hooks[rank % len(hooks)]))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    "other", [{"wire_format": "int2"}, {"factor_format": "int8"}, {"sync_rank_fraction": 0.1}, {"chunk": 100}], ids=str
)
def test_mixed_formats_are_caught_when_the_hook_attaches(replicas, other):
    for message in replicas.run(2, error_at_attach, [{}, other]):
        assert (
            "replicas differ: rank 0 has [hook SyncSettings(" in message and str(next(iter(other.values()))) in message
        )


def test_a_dtype_that_cannot_be_quantized(replicas):
    for message in replicas.run(2, error_at_attach, [{"wire_format": "int4"}], torch.float64):
        assert "0.weight is torch.float64, which wire_format='int4', factor_format=" in message
        assert "use wire_format='float32'" in message
    assert replicas.run(2, error_at_attach, [{}], torch.float64) == [None, None]


class OnlyAllReduce(dist.ProcessGroup):
    """A backend like some for special fabrics: gloo, without its all-to-all."""

    def __init__(self, store, rank, size, timeout):
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self):
        return "only_all_reduce"

    def allreduce(self, *args):
        return self._gloo.allreduce(*args)

    def allgather(self, *args):
        return self._gloo.allgather(*args)

    def broadcast(self, *args):
        return self._gloo.broadcast(*args)


def poor_backend(rank, world, hook):
    dist.Backend.register_backend(
        "only_all_reduce", lambda store, r, size, timeout: OnlyAllReduce(store, r, size, timeout), devices=["cpu"]
    )
    group = dist.new_group(backend="only_all_reduce")
    return error_at_attach(rank, world, [{"group": group, **hook}])


def test_a_backend_that_cannot_carry_a_format(replicas):
    for message in replicas.run(3, poor_backend, {"wire_format": "int2"}):
        assert "only_all_reduce backend cannot carry wire_format='int2', factor_format=" in message
        assert "use wire_format='float32', or the backend gloo (CPU) or nccl (GPU), which carry every format" in message
    assert replicas.run(3, poor_backend, {}) == [None] * 3


def diverged(rank, world, wire_format, value):
    model, optimizer = build(hook={"wire_format": wire_format, "momentum": "local"}, trigger=EveryNSteps(2))
    train_step(model, optimizer, 0, shard=rank)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if rank == 1:
        model.down[1].weight.data[3, 3] = value
    with pytest.raises(ValueError, match=r"displacement of down\.1\.weight holds NaN.* cannot be quantized"):
        optimizer.step()
    return [name for name, parameter in model.named_parameters() if not torch.isfinite(parameter).all()]


@pytest.mark.parametrize(("wire_format", "value"), [(f, math.nan) for f in CODED] + [("int2", math.inf)])
@pytest.mark.parametrize("world", [2, 3])
def test_a_replica_that_diverged_is_an_error_on_all_of_them(replicas, wire_format, value, world):
    answers = replicas.run(world, diverged, wire_format, value, timeout=20)
    assert answers == [["down.1.weight"] if rank == 1 else [] for rank in range(world)], "nobody took it over"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor_format": "int1"}, "factor_format must be one of 'float32', .*, not 'int1'"),
        ({"residual_dtype": "float16"}, "residual_dtype must be one of 'float32', 'bfloat16', not 'float16'"),
        ({"sync_rank_fraction": 0.0}, r"sync_rank_fraction must be in \(0, 1\]"),
        ({"sync_rank_fraction": 0.1, "momentum": "local"}, 'is the rank of what momentum="factors" sends'),
        ({"sync_rank_fraction": 0.1, "consensus": "none"}, 'is the rank of what momentum="factors" sends'),
        ({"chunk": 0}, "chunk must be at least 1"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ProcessGroupSync(**options)


@pytest.mark.parametrize("factor_format", ["int2", "sign"])
def test_a_whole_momentum_in_two_bits_is_warned_of(factor_format):
    with pytest.warns(UserWarning, match=f"a whole momentum in {factor_format} is known to hurt"):
        ProcessGroupSync(momentum="average", wire_format="int2", factor_format=factor_format)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ProcessGroupSync(momentum="average", wire_format="int2")
        ProcessGroupSync(momentum="factors", wire_format="int2", factor_format=factor_format)


def test_residual_dtype_is_a_name_or_a_dtype():
    assert ProcessGroupSync(residual_dtype=torch.bfloat16).settings.residual_dtype == "bfloat16"


# -- memory -----------------------------------------------------------------------------------------------------------


def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def growth(rank, world, chunk):
    """Bytes that the second sync step needs beside what there was before it."""
    parameter = nn.Parameter(torch.zeros(8_000_000))
    optimizer = CurvaDion([{"params": [parameter], "algorithm": "lion"}], trigger=EveryNSteps(1))
    optimizer.register_sync_hook(ProcessGroupSync(wire_format="int4", momentum="local", chunk=chunk))
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is that from here on
    before = resident("VmRSS")
    optimizer.step()
    assert optimizer.last_step.synced
    return resident("VmHWM") - before


@pytest.mark.skipif(not hasattr(__import__("os"), "sched_getaffinity"), reason="reads /proc, which Linux has")
@pytest.mark.parametrize("world", [2, 3])
def test_peak_memory_grows_by_a_chunk_and_not_by_the_model(replicas, world):
    model = 4 * 8_000_000
    # Lion itself needs a temporary as large as the parameter.
    in_chunks, whole = (max(replicas.run(world, growth, chunk)) for chunk in (2**18, 2**30))
    assert in_chunks < 1.5 * model < 2.5 * model < whole
