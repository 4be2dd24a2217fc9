"""Checks that all replicas are about to train the same model with the same settings, before training begins."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, get_process_group_ranks
from torch.nn.parallel import DistributedDataParallel

from ..optim.curvadion import CurvaDion
from ..optim.parameter_groups import GROUP_OPTIONS
from .errors import ReplicaLostError
from .payload_collectives import PayloadCollectives
from .payloads import TensorPayload
from .settings import SyncSettings
from .sharding_checks import is_fully_sharded, refuse_flat_parameters

_QUANTIZABLE = (torch.float32, torch.float16, torch.bfloat16)
_REMEDY = "build the same model and the same optimizer, in the same order, in every process"


def describe_optimizer(optimizer: CurvaDion) -> list[str]:
    """A line for the trigger and one for each parameter, with all that must be the same on every replica."""
    trigger = f"trigger {type(optimizer.trigger).__name__} {sorted(vars(optimizer.trigger).items())}"
    lines = [f"{trigger} max_local_steps {optimizer.max_local_steps}"]
    names = optimizer.named_parameters()
    for group in optimizer.param_groups:
        options = {key: group[key] for key in GROUP_OPTIONS}
        for parameter in group["params"]:
            name, _ = next(names)
            # A replica that has trained has residuals, and one that comes has none.
            state = sorted(optimizer.state[parameter].keys() - {"residual"})
            frozen = "" if parameter.requires_grad else " frozen"
            lines.append(f"{name} {tuple(parameter.shape)} {parameter.dtype}{frozen} {options} {state}")
    return lines


def check_data_parallel(module: nn.Module, inner_group: ProcessGroup | None, sharded: bool = False) -> None:
    """Check that gradients are averaged at every step inside of a replica, and nowhere else.

    Args:
        module: What is trained.
        inner_group: The processes of this replica; ``None`` where it is one process.
        sharded: Whether the optimizers hold sharded parameters, which ``fully_shard`` gathers and averages.

    Raises:
        ValueError: A part is wrapped in ``FullyShardedDataParallel``. ``fully_shard`` was called on one of module and
            optimizer alone. A replica is one process, and a part is wrapped in ``DistributedDataParallel``. A replica
            is several, and the module is not wrapped in it, or in one of another group.
    """
    refuse_flat_parameters(module)
    if is_fully_sharded(module) != sharded:
        raise ValueError(
            "call fully_shard on the module that you include, and make the optimizer after that: its parameters are"
            f" {'sharded, and this module is whole' if sharded else 'whole, and this module is sharded'}"
        )
    if sharded:
        return
    if inner_group is not None:
        if not isinstance(module, DistributedDataParallel):
            raise ValueError(
                "wrap the module in DistributedDataParallel(module, process_group=inner_group) and include that, or"
                " call fully_shard on it before you make the optimizer: the gradients of the"
                f" {inner_group.size()} processes of a replica must be averaged at every step"
            )
        if set(get_process_group_ranks(module.process_group)) != set(get_process_group_ranks(inner_group)):
            raise ValueError(
                f"give DistributedDataParallel process_group=inner_group: it averages the gradients of ranks"
                f" {get_process_group_ranks(module.process_group)}, but a replica consists of ranks"
                f" {get_process_group_ranks(inner_group)}"
            )
        return
    for name, part in module.named_modules():
        if isinstance(part, DistributedDataParallel):
            raise ValueError(
                f"leave DistributedDataParallel out: {name or 'the module'} is wrapped in it and would send all its"
                " gradients at every step, beside what the sync hook sends. For replicas of several processes give the"
                " hook their inner_group"
            )


def describe_module(module: nn.Module) -> list[str]:
    """A line for each parameter and buffer."""
    tensors: list[tuple[str, Tensor]] = [*module.named_parameters(), *module.named_buffers()]
    return [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors]


def verify_same_across_replicas(collectives: PayloadCollectives, description: list[str], device: torch.device) -> None:
    """Compare descriptions through their digests, in one small all-gather.

    Raises:
        ValueError: They differ; on every replica, naming the first difference.
    """
    digest = hashlib.sha256("\n".join(description).encode()).digest()
    own = torch.tensor(list(digest), dtype=torch.uint8, device=device)
    if not all(torch.equal(other, own) for other in collectives.all_processes(own)):
        raise ValueError(first_difference(collectives.all_gather_object(description)))


def verify_wire_formats(
    collectives: PayloadCollectives, optimizer: CurvaDion, settings: SyncSettings, device: torch.device
) -> None:
    """Check that the parameters can be quantized, and by a try that the backend carries quantized numbers.

    Call it after :func:`verify_same_across_replicas`: all replicas then raise, or none.

    Args:
        collectives: Of the process group.
        optimizer: Holds the parameters.
        settings: Of the hook.
        device: Of the parameters.

    Raises:
        ValueError: Naming the parameter or the backend, and what can be used instead.
    """
    formats = {
        "wire_format": settings.wire_format,
        "vector_format": settings.embedding_format,
        "factor_format": settings.factor_format,
    }
    quantized = {name: wire_format for name, wire_format in formats.items() if wire_format != "float32"}
    chosen = ", ".join(f"{name}={wire_format!r}" for name, wire_format in quantized.items())
    if not quantized:
        return
    for name, parameter in optimizer.named_parameters():
        if parameter.dtype not in _QUANTIZABLE:
            raise ValueError(
                f"use wire_format='float32', which sends numbers at full width, or train in float32: {name} is"
                f" {parameter.dtype}, which {chosen} cannot quantize (float32, float16 and bfloat16 it can)"
            )
    try:
        probe = TensorPayload("probe", torch.zeros(1, device=device), next(iter(quantized.values())))
        collectives.average([probe])
    except ReplicaLostError:
        raise
    except RuntimeError as error:
        raise ValueError(
            f"use wire_format='float32', or the backend gloo (CPU) or nccl (GPU), which carry every format: the"
            f" {collectives.backend} backend cannot carry {chosen} ({error})"
        ) from error


def first_difference(descriptions: Sequence[list[str]], places: Sequence[str] = ()) -> str:
    """What an error says of descriptions that differ.

    Args:
        descriptions: Of each replica.
        places: What the replicas are called; their ranks by default.
    """
    places = places or [f"rank {rank}" for rank in range(len(descriptions))]
    reference = descriptions[0]
    for place, other in zip(places, descriptions, strict=True):
        for expected, found in zip(reference, other, strict=False):
            if expected != found:
                return f"replicas differ: {places[0]} has [{expected}] where {place} has [{found}]; {_REMEDY}"
        if len(other) != len(reference):
            return f"replicas differ: {places[0]} has {len(reference)} entries and {place} has {len(other)}; {_REMEDY}"
    raise AssertionError("digests differ but descriptions do not")
