"""What one replica sends and stores: the traffic of its steps and the memory of its tensors."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...optim.curvadion import CurvaDion
from ...optim.triggers import EveryNSteps, LocalStepCap
from ...sync.process_group_sync import ProcessGroupSync
from ...sync.settings import SyncSettings
from .dry_run import DryRunSync, StepTraffic, dry_run_step

# Defaults of DistributedDataParallel. The first bucket is small so that reducing starts early.
_FIRST_BUCKET_BYTES, _BUCKET_BYTES = 2**20, 25 * 2**20
# State that the sync hook keeps; the optimizer alone, as under DDP, has none of it.
_SYNC_STATE = {"residual", "outer_momentum"}


@dataclass(frozen=True)
class Footprint:
    """Traffic and memory of one replica; memory in bytes.

    Attributes:
        local: Traffic of a local step.
        sync: Traffic of a sync step.
        buckets: DDP's gradient buckets in bytes, in the order in which they become ready.
        parameters: Memory of the parameters, frozen ones included.
        gradients: Memory of the gradients.
        optimizer_state: Memory of the optimizer's state; under DDP it is the same.
        anchors: Memory of the parameters at the last consensus.
        residuals: Memory of the error-feedback residuals and of the outer momentum.
        copies: Memory of what a mean was sent from, while it is under way with overlap.
    """

    local: StepTraffic
    sync: StepTraffic
    buckets: tuple[int, ...]
    parameters: int
    gradients: int
    optimizer_state: int
    anchors: int
    residuals: int
    copies: int


def measure_footprint(module: nn.Module, optimizer: CurvaDion, settings: SyncSettings, replicas: int) -> Footprint:
    """Dry-run a local step and a sync step.

    Args:
        module: On the meta device; its persistent buffers are averaged too.
        optimizer: Of its parameters. A copy of both takes the steps.
        settings: Of the sync hook.
        replicas: Number of replicas.

    Example::

        >>> from lightning_curvadion import CurvaDion, split_parameters
        >>> from lightning_curvadion.trainer.strategy import CurvaDionStrategy
        >>> with torch.device("meta"):
        ...     model = nn.Sequential(nn.Embedding(1000, 64), nn.Linear(64, 256), nn.Linear(256, 64))
        >>> defaults = CurvaDionStrategy().sync.settings
        >>> footprint = measure_footprint(model, CurvaDion(split_parameters(model)), defaults, replicas=2)
        >>> footprint.local.collectives, footprint.sync.collectives[1:]
        ([Collective(kind='maximum', nbytes=16)], [Collective(kind='all-gather', nbytes=13999)])
    """
    module, optimizer = copy.deepcopy((module, optimizer))
    sync = DryRunSync(settings, replicas)
    with torch.device("meta"):
        optimizer.register_sync_hook(sync)
        sync.include_module(module)
        trainable = [p for _, p in optimizer.named_parameters() if p.requires_grad]
        for parameter in trainable:
            parameter.grad = torch.empty_like(parameter)
        # Local first: what a sync step sends can depend on whether the replicas have drifted.
        local_traffic, sync_traffic = (dry_run_step(optimizer, sync, synced) for synced in (False, True))
    state_bytes = [
        (key, tensor.nbytes)
        for state in optimizer.state.values()
        for key, tensor in state.items()
        if isinstance(tensor, Tensor)
    ]
    return Footprint(
        local=local_traffic,
        sync=sync_traffic,
        buckets=ddp_buckets([p for p in module.parameters() if p.requires_grad]),
        parameters=sum(p.nbytes for p in module.parameters()),
        gradients=sum(p.nbytes for p in trainable),
        optimizer_state=sum(nbytes for key, nbytes in state_bytes if key not in _SYNC_STATE),
        anchors=sync.anchor_bytes,
        residuals=sum(nbytes for key, nbytes in state_bytes if key in _SYNC_STATE),
        copies=sum(p.nbytes for p in trainable) // settings.spread if settings.overlap else 0,
    )


def dion_step_traffic(module: nn.Module, optimizer: CurvaDion, replicas: int) -> StepTraffic:
    """What every step of Dion sends: float32 factors of the momentum, and no parameters.

    Args:
        module: On the meta device.
        optimizer: Of its parameters. A copy of both takes the step.
        replicas: Number of replicas.

    Example::

        >>> from lightning_curvadion import CurvaDion, split_parameters
        >>> model = nn.Linear(256, 64, bias=False, device="meta")
        >>> optimizer = CurvaDion(split_parameters(model), rank_fraction=0.25)
        >>> dion_step_traffic(model, optimizer, replicas=2).bytes_sent == 16 + 4 * 16 * (256 + 64)
        True
    """
    module, optimizer = copy.deepcopy((module, optimizer))
    # Dion watches nothing: its agreement has 16 bytes, whatever the trigger.
    optimizer._cap = LocalStepCap(EveryNSteps(1), None)
    for group in optimizer.param_groups:
        group["local_update"] = "dion"
    sync = DryRunSync(ProcessGroupSync(consensus="none").settings, replicas)
    with torch.device("meta"):
        optimizer.register_sync_hook(sync)
        for _, parameter in optimizer.named_parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        return dry_run_step(optimizer, sync, synced=True)


def ddp_buckets(parameters: Sequence[Tensor]) -> tuple[int, ...]:
    """Bytes of the gradient buckets of DistributedDataParallel with its defaults, in the order of a backward pass.

    Args:
        parameters: The trainable ones, in the order of the module.

    Example::

        >>> ddp_buckets([torch.empty(2**18, device="meta") for _ in range(30)])
        (1048576, 26214400, 4194304)
    """
    late_first = list(reversed(parameters))
    buckets, _ = dist._compute_bucket_assignment_by_size(  # type: ignore[attr-defined]
        late_first, [_FIRST_BUCKET_BYTES, _BUCKET_BYTES]
    )
    return tuple(sum(late_first[index].nbytes for index in bucket) for bucket in buckets)
