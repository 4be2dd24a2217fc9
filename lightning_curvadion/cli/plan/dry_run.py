"""Dry-run of a training step: the real optimizer and the real sync hook step on tensors without memory.

On torch's "meta" device a tensor has a shape and no values. A step there runs the same code as any other step, up to
the collectives. A plan can therefore not differ from what the training sends, whatever the size of the model.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ...optim.curvadion import CurvaDion
from ...optim.optimizer_state import state_tensors
from ...optim.triggers import EveryNSteps, LocalStepCap
from ...sync.agreement import Agreed
from ...sync.chunks import FULL_WIDTH
from ...sync.payload_checks import PayloadCheck
from ...sync.payload_collectives import PayloadCollectives
from ...sync.payloads import FactorPayload, Payload
from ...sync.process_group_sync import ProcessGroupSync
from ...sync.replica_checks import verify_wire_formats
from ...sync.settings import SyncSettings
from ...sync.transfers import Transfer
from .collective_costs import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, BROADCAST, MAXIMUM, Collective
from .launch_counter import LaunchCounter

# Copies of a chunk during a sync step: its flat buffer, its quantized form, and what is dequantized from that. The
# memory note of ProcessGroupSync counts the same.
_BUFFERS_PER_CHUNK = 5
# SHA-256 of a description that must be the same on every replica.
_DESCRIPTION_DIGEST = 32


@dataclass
class StepTraffic:
    """What one step sends.

    Attributes:
        collectives: In their order, as rank 0 calls them.
        stages: Those of the mean, by the stages in which they are under way with overlap; one stage follows another.
        numbers: How many numbers travel in each wire format.
        bytes_sent: Payload, as counted by
            :attr:`ProcessGroupSync.bytes_sent <lightning_curvadion.ProcessGroupSync.bytes_sent>`.
        temporaries: Bytes that exist during the step only: buffers of a chunk, and factors.
        launches: Kernel launches of the step, the optimizer's own work included; see
            :class:`~lightning_curvadion.cli.plan.launch_counter.LaunchCounter`.
    """

    collectives: list[Collective] = field(default_factory=list)
    stages: list[list[Collective]] = field(default_factory=list)
    numbers: Counter[str] = field(default_factory=Counter)
    bytes_sent: int = 0
    temporaries: int = 0
    launches: int = 0


class Arrived(Transfer):
    """The result of a collective that was not called.

    Args:
        result: Of its shape.
    """

    def __init__(self, result: Tensor) -> None:
        self.result = result

    def wait(self) -> Tensor:  # noqa: D102
        return self.result


class CollectiveRecorder(PayloadCollectives):
    """Collectives that send nothing and record what they would send.

    Args:
        replicas: Number of replicas.
        chunk: Numbers per chunk.

    Attributes:
        traffic: What was recorded since it was last replaced.
        buffers_differ: Whether floating-point buffers differ between the replicas, as running statistics do after a
            step. Frozen parameters and counters are equal.
    """

    def __init__(self, replicas: int, chunk: int) -> None:
        super().__init__(None, chunk)
        self.world_size = replicas
        self.traffic = StepTraffic()
        self.buffers_differ = True

    def record_agreement(self, message: Tensor) -> None:
        """The maximum of a step's numbers."""
        self._record(MAXIMUM, message.nbytes, bytes_sent=message.nbytes)

    def differing(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:  # noqa: D102
        if tensors:
            nbytes = 2 * torch.int64.itemsize * len(tensors)
            self._record(MAXIMUM, nbytes, bytes_sent=nbytes)
        return {
            name: tensor
            for name, tensor in tensors.items()
            if self.buffers_differ and tensor.is_floating_point() and not isinstance(tensor, nn.Parameter)
        }

    def start_all_reduce_sum(self, flat: Tensor) -> Transfer:  # noqa: D102
        self._record(ALL_REDUCE, flat.nbytes, bytes_sent=flat.nbytes)
        return Arrived(flat)

    def start_all_to_all(self, outgoing: Tensor) -> Transfer:  # noqa: D102
        to_others = outgoing.nbytes // self.world_size * (self.world_size - 1)
        self._record(ALL_TO_ALL, outgoing.nbytes, bytes_sent=to_others)
        return Arrived(torch.empty_like(outgoing))

    def start_all_gather(self, own: Tensor) -> Transfer:  # noqa: D102
        self._record(ALL_GATHER, own.nbytes, bytes_sent=own.nbytes)
        return Arrived(own.new_empty(self.world_size, own.numel()))

    def set_anywhere(self, masks: Sequence[Tensor]) -> list[Tensor]:
        """Everywhere: how many rows of an embedding are at rest is the data's to say."""
        numel = sum(mask.numel() for mask in masks)
        self.all_gather(masks[0].new_empty(-(-numel // 8), dtype=torch.uint8))
        return [torch.arange(mask.numel(), device=mask.device) for mask in masks]

    def broadcast_bytes(self, flat: Tensor) -> None:  # noqa: D102
        self._record(BROADCAST, flat.nbytes, bytes_sent=flat.nbytes)

    def average(self, payloads: Sequence[Payload]) -> None:  # noqa: D102
        factors = sum(payload.numel for payload in payloads if isinstance(payload, FactorPayload))
        buffered = min(self._chunk, sum(payload.numel for payload in payloads))
        temporaries = 4 * (2 * factors + _BUFFERS_PER_CHUNK * buffered)
        self.traffic.temporaries = max(self.traffic.temporaries, temporaries)
        for payload in payloads:
            wire_format = "float32" if payload.wire_format in FULL_WIDTH else payload.wire_format
            self.traffic.numbers[wire_format] += payload.numel
        # After the agreement the replicas ask each other what is due. Of all chunks, one kind is sent after the other.
        sent = self.traffic.collectives
        questions, before = sent[1:], len(sent)
        super().average(payloads)
        mean = sent[before:]
        by_kind = [[each for each in mean if each.kind == kind] for kind in dict.fromkeys(each.kind for each in mean)]
        self.traffic.stages = [stage for stage in (questions, *by_kind) if stage]

    def verify_flags(self, flags: Tensor, check: PayloadCheck) -> None:
        """There are no values to look at."""

    def _record(self, kind: str, nbytes: int, bytes_sent: int) -> None:
        self.traffic.collectives.append(Collective(kind, nbytes))
        self.traffic.bytes_sent += bytes_sent


class DryRunSync(ProcessGroupSync):
    """A :class:`ProcessGroupSync` without a process group: it records its collectives.

    Args:
        settings: Of the hook that is planned.
        replicas: Number of replicas.
    """

    def __init__(self, settings: SyncSettings, replicas: int) -> None:
        self.recorder = CollectiveRecorder(replicas, settings.chunk)
        # What is sent in all is the same with a lag and with overlap. Here it lies in one step: nothing runs in the
        # background where no process group was made for it.
        super().__init__(group=None, **{**vars(settings), "lag": 0})

    def _make_collectives(self, group: ProcessGroup | None, chunk: int) -> PayloadCollectives:
        return self.recorder

    def include_module(self, module: nn.Module) -> None:  # noqa: D102
        self._untrained.include(module)
        self._compare_descriptions()
        self.recorder.differing({**self._untrained.parameters_outside(), **dict(module.named_buffers())})

    def _attach(self, optimizer: CurvaDion) -> None:
        self._compare_descriptions()
        verify_wire_formats(self.recorder, optimizer, self.settings, torch.device("meta"))
        self.recorder.differing({**dict(optimizer.named_parameters()), **state_tensors(optimizer)})
        self._register(optimizer, anew=True)

    def _compare_descriptions(self) -> None:
        self.recorder.all_gather(torch.empty(_DESCRIPTION_DIGEST, dtype=torch.uint8, device="meta"))

    def _agree(self, signal: Tensor) -> Agreed:
        """RMMC and drift 0 and finite gradients: there are no values to look at."""
        self.recorder.record_agreement(self.agreement.message(signal, self._own_drift()))
        return Agreed()


def dry_run_step(optimizer: CurvaDion, sync: DryRunSync, synced: bool) -> StepTraffic:
    """Take one step and return what it would send and launch.

    Args:
        optimizer: On the meta device, with ``sync`` attached and all gradients set.
        sync: The recording hook.
        synced: Whether the step synchronises.

    Example::

        >>> import torch
        >>> model = torch.nn.Linear(256, 64, bias=False, device="meta")
        >>> model.weight.grad = torch.empty_like(model.weight)
        >>> optimizer, sync = CurvaDion(model.parameters()), DryRunSync(ProcessGroupSync().settings, replicas=2)
        >>> with torch.device("meta"):
        ...     optimizer.register_sync_hook(sync)
        ...     dry_run_step(optimizer, sync, synced=False).collectives
        [Collective(kind='maximum', nbytes=16)]
    """
    optimizer._cap = LocalStepCap(EveryNSteps(1 if synced else 2), None)
    traffic = sync.recorder.traffic = StepTraffic()
    with LaunchCounter() as counter:
        optimizer.step()
    traffic.launches = counter.launches.total()
    return traffic
