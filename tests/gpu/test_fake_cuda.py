"""The whole life of an optimizer on a GPU that is not there: devices, dtypes of collectives, and waits of the host."""

import pytest
import torch
import torch.distributed as dist
from fake_cuda import FakeGPU, fake_cuda
from paces import every, steps_per_agreement
from torch import Tensor, nn

from lightning_curvadion import CurvaDion, DriftThreshold, EveryNSteps, ProcessGroupSync, split_parameters
from lightning_curvadion.optim import dion

# What the replicas agree on where the parameters of one were set to something else.
SETTLE = 0.25
# What they agree on where none of them takes a step.
NO_STEP = (-1.0, 0.9)
AGREEMENT = "sync/pending_numbers.py read"


class Model(nn.Module):
    """Each kind of parameter: an embedding of many rows, matrices, kernels, experts, norms, biases; and buffers."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1024, 4)
        self.up = nn.ModuleList(nn.Linear(4, 6, bias=False) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(6, 4, bias=False) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(4, bias=False) for _ in range(layers))
        self.convolution = nn.Conv2d(4, 6, 3, bias=False)
        # Its strides allow no view as a matrix.
        self.convolution.weight = nn.Parameter(self.convolution.weight.detach().to(memory_format=torch.channels_last))
        self.batch_norm = nn.BatchNorm2d(6)
        self.experts = nn.Parameter(torch.zeros(3, 4, 4))
        self.head = nn.Linear(4, 5)


def model_on_gpu(layers: int = 1, dtype: torch.dtype = torch.float32) -> Model:
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            return Model(layers)
    finally:
        torch.set_default_dtype(torch.float32)


def build(gpu: FakeGPU, hook: dict, layers: int = 1, dtype: torch.dtype = torch.float32, **options):
    """The model, the optimizer and the hook, of replicas that started with different values."""
    model = model_on_gpu(layers, dtype)
    overrides = {"experts": "dion", "head.*": "lion"}
    optimizer = CurvaDion(split_parameters(model, overrides), **{"trigger": EveryNSteps(2), **options})
    sync = ProcessGroupSync(**hook)
    gpu.differ = True
    optimizer.register_sync_hook(sync)
    sync.include_module(model)
    gpu.differ = False
    return model, optimizer, sync


def take_step(gpu: FakeGPU, model: nn.Module, optimizer: CurvaDion) -> list[str]:
    """Who waited in a step."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    gpu.forget()
    optimizer.step()
    return gpu.waits


LIVES = [
    (2, {}, {}, torch.float32),
    (4, {"spread": 2, "chunk": 3000, "outer_momentum": 0.5}, {}, torch.bfloat16),
    (2, {"wire_format": "float32", "momentum": "average"}, {}, torch.float16),
    (4, {"wire_format": "bfloat16", "momentum": "factors"}, {"rank_fraction": 0.25}, torch.float32),
    (4, {"wire_format": "int8", "momentum": "local"}, {"local_update": "sgd", "local_lr": 0.1}, torch.float16),
    (2, {"wire_format": "int4", "momentum": "dion"}, {"rank_fraction": 1.0}, torch.bfloat16),
    (4, {"wire_format": "int2", "momentum": "factors"}, {}, torch.bfloat16),
    (2, {"wire_format": "sign", "momentum": "factors", "sync_rank_fraction": 0.25}, {}, torch.float16),
    (4, {"consensus": "factors", "factor_format": "int4"}, {"rank_fraction": 0.5}, torch.float32),
    (2, {"consensus": "none"}, {"rank_fraction": 0.5}, torch.bfloat16),
    (2, {}, {"trigger": DriftThreshold(1.0), "max_local_steps": 1}, torch.float32),
    (2, {"lag": 1, "overlap": 1}, {}, torch.float32),
    (4, {"lag": 2, "overlap": 2, "spread": 2, "outer_momentum": 0.5}, {}, torch.bfloat16),
    (4, {"lag": 1, "wire_format": "float32", "momentum": "factors"}, {"rank_fraction": 0.5}, torch.float16),
]


@pytest.mark.parametrize(("world", "hook", "options", "dtype"), LIVES)
def test_from_start_to_checkpoint_all_is_on_the_gpu_and_of_dtypes_that_nccl_carries(world, hook, options, dtype):
    with fake_cuda(world, rank=world - 1) as gpu:
        model, optimizer, sync = build(gpu, hook, dtype=dtype, **options)
        sync.measure_drift()
        for number in range(4):
            waits = take_step(gpu, model, optimizer)
            assert gpu.collectives, "the hook took no part in the step"
            if sync.settings.lag:
                # A sync step that is not in the background waits for its own agreement as well.
                confirms = optimizer.last_step.synced and not sync.settings.overlap
                assert waits.count(AGREEMENT) <= 1 + confirms
            elif not optimizer.last_step.synced:
                # The first step copies what its numbers are multiplied by.
                assert waits[number == 0 :] == [AGREEMENT]
        assert optimizer.sync_steps == 2
        assert sync.drift is None or sync.drift == 1.0
        assert optimizer.rmmc_by_parameter()
        for gpu.differ in (False, True):
            sync.reach_consensus(optimizer)
            sync.reach_consensus(optimizer, include_state=True)
        sync.note_other_values(model.parameters())
        optimizer.load_state_dict(optimizer.state_dict())
        if sync.settings.consensus != "none":
            gpu.agreed = (0.5, SETTLE)
        take_step(gpu, model, optimizer)
        tensors = [value for own in optimizer.state.values() for value in own.values() if isinstance(value, Tensor)]
        assert all(tensor.is_cuda for tensor in tensors)


@pytest.mark.parametrize(
    ("world", "hook", "most"),
    [
        (2, {}, 4),
        (4, {"wire_format": "int4", "momentum": "factors"}, 5),
        (4, {"consensus": "factors", "wire_format": "sign"}, 5),
    ],
)
def test_the_host_waits_as_often_for_twelve_layers_as_for_two(world, hook, most):
    waits = {}
    for layers in (2, 12):
        with fake_cuda(world) as gpu:
            model, optimizer, _ = build(gpu, {**hook, "lag": 0}, layers, rank_fraction=0.5)
            take_step(gpu, model, optimizer)
            waits[layers] = [take_step(gpu, model, optimizer) for _ in range(2)]
    assert waits[2] == waits[12]
    sync, local = waits[2]
    assert local == [AGREEMENT]
    # Which buffers differ, which rows of the embedding have moved, and for each mean whether it can be quantized.
    assert len(sync) <= most


@pytest.mark.parametrize("world", [2, 4])
def test_fast_and_slow_replicas_wait_no_more_than_others(world):
    with fake_cuda(world) as gpu:
        # Of each replica so many steps so far, and in its displacement.
        steps = (5.0,) * 2 * world
        gpu.agreed += steps
        model, optimizer, sync = build(gpu, {"heterogeneous": True, "overlap": 3}, trigger=EveryNSteps(3))
        # The first step copies what its numbers are multiplied by.
        take_step(gpu, model, optimizer)
        with steps_per_agreement(every(2)):
            waits = [take_step(gpu, model, optimizer) for _ in range(6)]
            assert waits == [[], [AGREEMENT]] * 3 and optimizer.last_step.synced
            for _ in range(6):
                take_step(gpu, model, optimizer)
            sync.agreement.read(optimizer)
        gpu.agreed = NO_STEP + steps
        sync.reach_consensus(optimizer, include_state=True)


def test_with_a_lag_the_host_reads_one_old_number_a_step_and_a_mean_in_the_background_when_it_has_arrived():
    waits = {}
    for layers in (2, 12):
        with fake_cuda(2) as gpu:
            model, optimizer, _ = build(gpu, {"lag": 1, "overlap": 4}, layers, trigger=EveryNSteps(5))
            waits[layers] = [take_step(gpu, model, optimizer) for _ in range(10)]
    assert waits[2] == waits[12]
    first, *others = waits[2]
    assert AGREEMENT not in first and all(own.count(AGREEMENT) == 1 for own in others)
    # A flight of step 4 asks which rows have moved, and which buffers differ, until step 6, and ends at step 8.
    assert [number for number, own in enumerate(waits[2]) if len(own) > 1] == [6, 8]


@pytest.mark.parametrize("layers", [2, 12])
def test_without_a_hook_the_host_reads_one_number_a_step(layers):
    with fake_cuda(1) as gpu:
        model = model_on_gpu(layers)
        optimizer = CurvaDion(split_parameters(model))
        take_step(gpu, model, optimizer)
        assert [take_step(gpu, model, optimizer) for _ in range(2)] == [["optim/curvadion.py step"]] * 2


@pytest.mark.parametrize("shape", [(1, 8, 8), (5, 24, 8)])
def test_columns_are_made_orthonormal_without_a_wait_for_the_device(shape):
    with fake_cuda(1) as gpu:
        Y = torch.ones(shape, device="cuda")
        dion.orthonormalize(Y)
        assert gpu.waits == []
        dion.orthonormalize(Y, "checked_cholesky")
        assert gpu.waits != [], "it looks at its own result, so it is for CPUs"


def test_buffers_that_a_module_keeps_on_the_cpu_take_part():
    with fake_cuda(2) as gpu:
        model = model_on_gpu()
        model.register_buffer("on_cpu", torch.zeros(3))
        model.register_buffer("count_on_cpu", torch.zeros(3, dtype=torch.int64))
        optimizer, sync = CurvaDion(split_parameters(model)), ProcessGroupSync(wire_format="float32")
        gpu.differ = True
        optimizer.register_sync_hook(sync)
        sync.include_module(model)
        take_step(gpu, model, optimizer)
        sync.reach_consensus(optimizer)


FAULTS = {
    "two devices": lambda numbers: numbers + torch.ones(4),
    "a number of the CPU beside one of the GPU": lambda numbers: torch.stack([numbers[0], torch.zeros(())]),
    "bool": lambda numbers: dist.all_reduce(numbers > 0, op=dist.ReduceOp.MAX),
    "int16": lambda numbers: dist.broadcast(numbers.short(), src=0),
    "on the CPU": lambda numbers: dist.all_reduce(torch.ones(4)),
    "strides": lambda numbers: dist.all_reduce(numbers.view(2, 2).T),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_fake_gpu_refuses(fault):
    with fake_cuda(2), pytest.raises((AssertionError, RuntimeError), match=r"device|NCCL|carries"):
        FAULTS[fault](torch.ones(4, device="cuda"))


WAITS = {
    "item": lambda numbers: numbers.sum().item(),
    "float": lambda numbers: float(numbers.sum()),
    "tolist": lambda numbers: numbers.tolist(),
    "bool": lambda numbers: bool(numbers.any()),
    "nonzero": lambda numbers: numbers.nonzero(),
    "cpu": lambda numbers: numbers.cpu(),
    "numbers of the host": lambda numbers: torch.tensor([1.0, 2.0], device="cuda"),
    "a number of the host": lambda numbers: numbers.__setitem__(0, 1.0),
    "copy_": lambda numbers: numbers.copy_(torch.ones(4)),
    "equal": lambda numbers: torch.equal(numbers, numbers),
    "a mask that is written through": lambda numbers: numbers.__setitem__(numbers > 0, 1.0),
    "cholesky": lambda numbers: torch.linalg.cholesky(numbers.view(2, 2)),
}


@pytest.mark.parametrize("wait", WAITS)
def test_the_fake_gpu_counts_a_wait(wait):
    with fake_cuda(1) as gpu:
        numbers = torch.ones(4, device="cuda")
        numbers.copy_(torch.ones(4), non_blocking=True)
        torch.where(numbers > 0, 1.0, numbers)[0] = numbers.max()
        assert gpu.waits == []
        WAITS[wait](numbers)
        assert len(gpu.waits) == 1
