"""Replicas that differ, and formats that do not fit, are errors on every rank before training."""

import time

import pytest
import torch
import torch.distributed as dist
from models import exact_sync
from torch import nn

from lightning_curvadion import CurvaDion, EveryNSteps, split_parameters

OPTIONS = {
    "max_local_steps": {"max_local_steps": 2},
    "lr": {"lr": 0.5},
    "mu": {"mu": 0.5},
    "betas": {"betas": (0.8, 0.9)},
    "weight_decay": {"weight_decay": 0.5},
    "eps": {"eps": 1e-3},
    "local_lr": {"local_lr": 0.5},
    "rank_fraction": {"rank_fraction": 0.25},
}


def different(rank, world, what):
    torch.manual_seed(0)
    width = 9 if what == "shape" and rank == 1 else 8
    layers = [nn.Linear(width, 4), nn.Linear(4, 4)]
    if what == "order" and rank == 1:
        layers.reverse()
    if what == "count" and rank == 1:
        layers.append(nn.Linear(4, 4))
    model = nn.Sequential(*layers)
    if what == "dtype" and rank == 1:
        model.double()
    trigger = EveryNSteps(3 if what == "trigger" and rank == 1 else 2)
    options = OPTIONS.get(what, {}) if rank == 1 else {}
    layout = {"matrices": {"packed": 2}} if what == "packed" and rank == 1 else {}
    optimizer = CurvaDion(split_parameters(model, options=layout), trigger=trigger, **options)
    hook = exact_sync(momentum="local" if what == "hook" and rank == 1 else "factors")
    try:
        optimizer.register_sync_hook(hook)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("what", ["shape", "order", "count", "dtype", "trigger", "hook", "packed", *OPTIONS])
def test_replicas_that_differ_get_a_clear_error_on_every_rank(replicas, what):
    before = time.monotonic()
    for message in replicas.run(3, different, what):
        assert message is not None and "replicas differ: rank 0 has" in message and "rank 1" in message
        assert "build the same model" in message
    assert time.monotonic() - before < 30, "an error, not a time-out"


def different_buffers(rank, world, persistent):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    if rank == 1:
        model.register_buffer("extra", torch.zeros(3), persistent=persistent)
    optimizer = CurvaDion(split_parameters(model))
    sync = exact_sync()
    optimizer.register_sync_hook(sync)
    with pytest.raises(ValueError, match="replicas differ: rank 0 has 4 entries and rank 1 has 5"):
        sync.include_module(model)


@pytest.mark.parametrize("persistent", [True, False])
def test_buffers_that_only_one_rank_has_are_an_error_and_not_a_hang(replicas, persistent):
    replicas.run(2, different_buffers, persistent, timeout=20)


def error_at_attach(rank, world, hooks, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False)).to(dtype)
    optimizer = CurvaDion([(name, p) for name, p in model.named_parameters()])
    try:
        optimizer.register_sync_hook(exact_sync(**hooks[rank % len(hooks)]))
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
        assert "0.weight is torch.float64, which wire_format='int4', vector_format=" in message
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
        assert "only_all_reduce backend cannot carry wire_format='int2', vector_format=" in message
        assert "use wire_format='float32', or the backend gloo (CPU) or nccl (GPU), which carry every format" in message
    assert replicas.run(3, poor_backend, {}) == [None] * 3
