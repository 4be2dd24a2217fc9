"""What a model sends and keeps: the real optimizer and the real hook take their steps on tensors without memory.

On torch's "meta" device a tensor has a shape and nothing else. A step there runs the code that a step runs anywhere, up
to the collectives, and so a plan of a model of any size cannot differ from what its training does.
"""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ...optim.curvadion import CurvaDion
from ...optim.triggers import EveryNSteps, LocalStepCap
from ...sync.chunks import Bucket, PayloadSlice, buckets_of
from ...sync.collectives import Collectives
from ...sync.payloads import FactorPayload, Payload
from ...sync.process_group_sync import ProcessGroupSync
from ...sync.settings import SyncSettings
from .collective_costs import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, Collective

# DistributedDataParallel's own: the first bucket is small so that reducing starts early.
_FIRST_BUCKET, _BUCKET = 2**20, 25 * 2**20
# The flat buffer of a chunk, its codes, and their decoding: what ProcessGroupSync documents.
_COPIES_OF_A_CHUNK = 5


@dataclass
class Traffic:
    """What one step sends.

    Attributes:
        collectives: In their order.
        numbers: How many numbers travel in which format.
        bytes_sent: Payload as :attr:`ProcessGroupSync.bytes_sent <lightning_curvadion.ProcessGroupSync.bytes_sent>`
            counts it.
        temporaries: Bytes that exist during the step only: buffers of a chunk, and factors.
    """

    collectives: list[Collective] = field(default_factory=list)
    numbers: Counter[str] = field(default_factory=Counter)
    bytes_sent: int = 0
    temporaries: int = 0


class Tally(Collectives):
    """An exchange that sends nothing and notes what it would send.

    Args:
        replicas: How many there would be.
        chunk: Numbers at a time.

    Attributes:
        traffic: Since it was last replaced.
    """

    def __init__(self, replicas: int, chunk: int) -> None:
        super().__init__(None, chunk)
        self.world_size = replicas
        self.traffic = Traffic()

    def all_reduce_max(self, signal: Tensor) -> None:  # noqa: D102
        self._note(ALL_REDUCE, signal.nbytes, counted=signal.nbytes)

    def all_gather(self, own: Tensor) -> Tensor:
        """Nobody's tensors: shape (0, elements)."""
        return own.new_empty(0, own.numel())

    def broadcast(self, tensors: Sequence[Tensor]) -> None:  # noqa: D102
        pass

    def average(self, payloads: Sequence[Payload]) -> None:  # noqa: D102
        factors = sum(payload.numel for payload in payloads if isinstance(payload, FactorPayload))
        buffered = min(self._chunk, sum(payload.numel for payload in payloads))
        needed = 4 * (2 * factors + _COPIES_OF_A_CHUNK * buffered)
        self.traffic.temporaries = max(self.traffic.temporaries, needed)
        super().average(payloads)

    def average_by_all_reduce(self, slices: Sequence[PayloadSlice]) -> None:  # noqa: D102
        width = 8 if any(payload.wire_format == "float64" for payload, _, _ in slices) else 4
        numel = sum(stop - start for _, start, stop in slices)
        self.traffic.numbers["float32"] += numel
        self._note(ALL_REDUCE, width * numel, counted=width * numel)

    def average_by_all_gather(self, slices: Sequence[PayloadSlice]) -> None:  # noqa: D102
        wire_buckets = self._coded(slices, shards=1)
        own = sum(bucket.width for bucket in wire_buckets)
        self._note(ALL_GATHER, own, counted=own)

    def average_by_all_to_all(self, slices: Sequence[PayloadSlice]) -> None:  # noqa: D102
        wire_buckets = self._coded(slices, shards=self.world_size)
        outgoing = self.world_size * sum(bucket.width for bucket in wire_buckets)
        mean = sum(bucket.mean_width for bucket in wire_buckets)
        self._note(ALL_TO_ALL, outgoing, counted=outgoing // self.world_size * (self.world_size - 1))
        self._note(ALL_GATHER, mean, counted=mean)

    def _coded(self, slices: Sequence[PayloadSlice], shards: int) -> list[Bucket]:
        wire_buckets = buckets_of(slices, shards)
        for bucket in wire_buckets:
            self.traffic.numbers[bucket.wire_format] += bucket.values.numel()
        return wire_buckets

    def _note(self, kind: str, nbytes: int, counted: int) -> None:
        self.traffic.collectives.append(Collective(kind, nbytes))
        self.traffic.bytes_sent += counted


class Rehearsal(ProcessGroupSync):
    """A hook between replicas that do not exist: a :class:`ProcessGroupSync` with a :class:`Tally`.

    Args:
        settings: Of the hook that is planned.
        replicas: How many.
    """

    def __init__(self, settings: SyncSettings, replicas: int) -> None:
        self.tally = Tally(replicas, settings.chunk)
        super().__init__(group=None, **vars(settings))

    def _make_collectives(self, group: ProcessGroup | None, chunk: int) -> Collectives:
        return self.tally

    def attach(self, optimizer: CurvaDion) -> None:  # noqa: D102
        optimizer.register_step_pre_hook(lambda *_: self._before_step(optimizer))

    def agree(self, signal: Tensor) -> tuple[float, float]:
        """No fault anywhere, and no RMMC to speak of."""
        self.tally.all_reduce_max(signal)
        return 0.0, 0.0


@dataclass(frozen=True)
class Footprint:
    """Bytes of one replica.

    Attributes:
        local: Traffic of a local step.
        sync: Traffic of a sync step.
        buckets: DDP's gradient buckets in bytes, in the order in which they become ready.
        parameters: Memory of the parameters, the frozen ones included.
        gradients: Memory of their gradients.
        state: Memory of the optimizer's state, as it is under DDP too.
        anchors: Memory of the last consensus.
        residuals: Memory of what coding kept back, and of an outer step.
    """

    local: Traffic
    sync: Traffic
    buckets: tuple[int, ...]
    parameters: int
    gradients: int
    state: int
    anchors: int
    residuals: int


def footprint_of(module: nn.Module, optimizer: CurvaDion, settings: SyncSettings, replicas: int) -> Footprint:
    """Rehearse a local step and a sync step.

    Args:
        module: On the meta device; its persistent buffers meet too.
        optimizer: Of its parameters; a copy steps.
        settings: Of the hook.
        replicas: How many.

    Example::

        >>> from lightning_curvadion import CurvaDion, split_parameters
        >>> from lightning_curvadion.trainer.strategy import CurvaDionStrategy
        >>> with torch.device("meta"):
        ...     model = nn.Sequential(nn.Embedding(1000, 64), nn.Linear(64, 256), nn.Linear(256, 64))
        >>> defaults = CurvaDionStrategy().sync.settings
        >>> footprint = footprint_of(model, CurvaDion(split_parameters(model)), defaults, replicas=2)
        >>> footprint.local.collectives, footprint.sync.collectives[1:]
        ([Collective(kind='all-reduce', nbytes=16)], [Collective(kind='all-gather', nbytes=13654)])
    """
    module, optimizer = copy.deepcopy((module, optimizer))
    hook = Rehearsal(settings, replicas)
    with torch.device("meta"):
        optimizer.register_sync_hook(hook)
        hook.include_module(module)
        trainable = [p for _, p in optimizer.named_parameters() if p.requires_grad]
        for parameter in trainable:
            parameter.grad = torch.empty_like(parameter)
        # Local first: what a sync step sends can depend on whether the replicas have parted.
        local, sync = (_rehearsed(optimizer, hook, synced) for synced in (False, True))
    ours = {"residual", "outer_momentum"}
    tensors = [
        (name, tensor.nbytes)
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if isinstance(tensor, Tensor)
    ]
    return Footprint(
        local=local,
        sync=sync,
        buckets=ddp_buckets([p for p in module.parameters() if p.requires_grad]),
        parameters=sum(p.nbytes for p in module.parameters()),
        gradients=sum(p.nbytes for p in trainable),
        state=sum(nbytes for name, nbytes in tensors if name not in ours),
        anchors=hook.anchor_bytes,
        residuals=sum(nbytes for name, nbytes in tensors if name in ours),
    )


def every_step_traffic(module: nn.Module, optimizer: CurvaDion, replicas: int) -> Traffic:
    """What Dion sends, which synchronises at every step: float32 factors of the momentum, and no parameters.

    Args:
        module: On the meta device.
        optimizer: Of its parameters; a copy steps.
        replicas: How many.

    Example::

        >>> from lightning_curvadion import CurvaDion, split_parameters
        >>> model = nn.Linear(256, 64, bias=False, device="meta")
        >>> optimizer = CurvaDion(split_parameters(model), rank_fraction=0.25)
        >>> every_step_traffic(model, optimizer, replicas=2).bytes_sent == 16 + 4 * 16 * (256 + 64)
        True
    """
    module, optimizer = copy.deepcopy((module, optimizer))
    hook = Rehearsal(ProcessGroupSync(consensus="none").settings, replicas)
    with torch.device("meta"):
        optimizer.register_sync_hook(hook)
        for _, parameter in optimizer.named_parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        return _rehearsed(optimizer, hook, synced=True)


def _rehearsed(optimizer: CurvaDion, hook: Rehearsal, synced: bool) -> Traffic:
    optimizer._cap = LocalStepCap(EveryNSteps(1 if synced else 2), None)
    hook.tally.traffic = Traffic()
    optimizer.step()
    return hook.tally.traffic


def ddp_buckets(parameters: Sequence[Tensor]) -> tuple[int, ...]:
    """Bytes of the gradient buckets of DistributedDataParallel by its defaults, in the order of a backward pass.

    Args:
        parameters: The trainable ones, in the order of the module.

    Example::

        >>> ddp_buckets([torch.empty(2**18, device="meta") for _ in range(30)])
        (1048576, 26214400, 4194304)
    """
    late_first = list(reversed(parameters))
    buckets, _ = dist._compute_bucket_assignment_by_size(  # type: ignore[attr-defined]
        late_first, [_FIRST_BUCKET, _BUCKET]
    )
    return tuple(sum(late_first[index].nbytes for index in bucket) for bucket in buckets)
