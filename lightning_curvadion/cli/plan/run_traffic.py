"""What a whole run sends, by cause: steps, validations, checkpoints, start and end."""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from ...optim.curvadion import CurvaDion
from ...optim.optimizer_state import averageable_state
from ...sync.payloads import full_width_payloads
from ...sync.settings import SyncSettings
from .dry_run import DryRunSync, StepTraffic, dry_run_step
from .schedule import Schedule


@dataclass(frozen=True)
class ConsensusPayload:
    """Payload of a replica outside of steps, in bytes.

    Attributes:
        start: Comparing the replicas before the first step; what differs then is sent too, which no plan knows.
        epoch: The agreement at the end of an epoch that no replica takes another step.
        validation: A validation after a local step.
        checkpoint: A checkpoint after a local step.
        checkpoint_after_validation: A checkpoint when a validation has sent the parameters.
        end: The end of fit after a checkpoint.
    """

    start: int
    epoch: int
    validation: int
    checkpoint: int
    checkpoint_after_validation: int
    end: int

    def of_run(self, schedule: Schedule) -> dict[str, int]:
        """Bytes of a run by cause; a schedule must be known. Where it has no number of epochs, one is counted.

        Example:
            >>> payload = ConsensusPayload(100, 16, 4000, 12_000, 8050, 50)
            >>> payload.of_run(Schedule(600, 2, 0, 1, epochs=2, validated_at_end=True, saved_at_end=True))
            {'validation': 8000, 'checkpoints': 8050, 'start and end': 182}
            >>> payload.of_run(Schedule(600, 0, 0, 0))["start and end"]
            12066
        """
        alone, validated = schedule.checkpoints or 0, schedule.checkpoints_after_validation or 0
        # A checkpoint takes two consensus, of the parameters and then of the state; the end takes one of both.
        unsaved = (self.checkpoint_after_validation if schedule.validated_at_end else self.checkpoint) - self.end
        end = self.end if schedule.saved_at_end else unsaved
        return {
            "validation": (schedule.validations or 0) * self.validation,
            "checkpoints": alone * self.checkpoint + validated * self.checkpoint_after_validation,
            "start and end": self.start + (schedule.epochs or 1) * self.epoch + end,
        }


def measure_consensus(
    module: nn.Module, optimizer: CurvaDion, settings: SyncSettings, replicas: int
) -> ConsensusPayload:
    """Dry-run what is sent outside of steps.

    Args:
        module: On the meta device.
        optimizer: Of its parameters. A copy of both is used.
        settings: Of the sync hook.
        replicas: Number of replicas.

    Example::

        >>> from lightning_curvadion import CurvaDion, ProcessGroupSync
        >>> model = nn.Linear(256, 64, bias=False, device="meta")
        >>> payload = measure_consensus(model, CurvaDion(model.parameters()), ProcessGroupSync().settings, replicas=2)
        >>> payload.validation - 4 * 256 * 64 < 100, payload.checkpoint > 2 * payload.validation - 200
        (True, True)
    """
    module, optimizer = copy.deepcopy((module, optimizer))
    sync = DryRunSync(settings, replicas)
    with torch.device("meta"):
        optimizer.register_sync_hook(sync)
        sync.include_module(module)
        for _, parameter in optimizer.named_parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        start = sync.recorder.traffic.bytes_sent
        # That no rank takes a step now.
        agreement = sync.agreement.message(torch.zeros(2, dtype=torch.float64)).nbytes

        def consensus() -> int:
            """Bytes of a consensus outside of steps, and of the agreement before it."""
            traffic = sync.recorder.traffic = StepTraffic()
            sync.reach_consensus(optimizer)
            return agreement + traffic.bytes_sent

        dry_run_step(optimizer, sync, synced=False)
        validation = consensus()
        sync.recorder.buffers_differ = False
        nothing_new = consensus()
        # Step counts are numbers, which a consensus of the state would read: its tensors are sent without it.
        traffic = sync.recorder.traffic = StepTraffic()
        means, from_rank_0 = full_width_payloads(averageable_state(optimizer))
        sync.recorder.average(means)
        sync.recorder.broadcast(from_rank_0)
    return ConsensusPayload(
        start=start,
        epoch=agreement,
        validation=validation,
        checkpoint=validation + nothing_new + traffic.bytes_sent,
        checkpoint_after_validation=2 * nothing_new + traffic.bytes_sent,
        end=nothing_new,
    )
