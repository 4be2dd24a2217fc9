"""GroupedHook: how a hook begins with optimizers in a process group, and goes on with them in another one."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..optim.curvadion import CurvaDion
from ..optim.optimizer_state import set_step_counts, state_tensors
from .displacement_meter import DisplacementMeter
from .recovering_hook import RecoveringHook
from .regrouping import Regrouping
from .replica_checks import describe_optimizer, verify_same_across_replicas, verify_wire_formats
from .settings import SyncSettings, resolve_settings
from .sharding_checks import check_sharding, holds_shards
from .transfer_to_newcomers import Arrival


class GroupedHook(RecoveringHook):
    """A :class:`RecoveringHook` whose optimizers enter process groups.

    Args:
        arguments: As for :class:`StepHook`, and the others too.
        group: Process group.
        inner_group: Of the processes of this replica.
    """

    def __init__(
        self, arguments: Mapping[str, Any], group: ProcessGroup | None, inner_group: ProcessGroup | None
    ) -> None:
        super().__init__(arguments, group, inner_group)
        # In the groups before this one.
        self._sent_before = 0
        # From a run that it is about to join.
        self._arrival: Arrival | None = None

    def settings_for(self, optimizer: CurvaDion) -> SyncSettings:
        """The settings with which the parameters of an optimizer synchronise: parameters in float64 have others."""
        if all(parameter.dtype != torch.float64 for _, parameter in optimizer.named_parameters()):
            return self.settings
        return resolve_settings(**self._arguments, quantizable=False)

    @property
    def bytes_sent(self) -> int:
        """Payload of this replica's collectives so far; a mean of n bytes, quantized or not, counts n.

        Where a replica has several processes, each of them counts what they send together to other replicas.
        """
        return self._sent_before + self._collectives.bytes_sent

    def _join(self, optimizer: CurvaDion) -> None:
        """Begin with an optimizer of all replicas, the same on all of them but for values: rank 0's values count."""
        self._enter_group(optimizer)
        device = next(optimizer.members())[1].device
        description = [f"hook {self.settings}", *describe_optimizer(optimizer)]
        verify_same_across_replicas(self._collectives, description, device)
        self.settings.check_trigger(optimizer.trigger)
        for _, parameter in optimizer.members():
            optimizer.state[parameter].pop("residual", None)
        verify_wire_formats(self._collectives, optimizer, self.settings, device)
        state = state_tensors(optimizer)
        self.take_from_rank_0({**dict(optimizer.named_parameters()), **state})
        set_step_counts(optimizer, state)
        optimizer.replicas_share_state()
        self._register(optimizer, anew=True)
        self._open_groups()

    def _enter_group(self, optimizer: CurvaDion) -> None:
        """Use the process group for an optimizer."""
        settings = self.settings_for(optimizer)
        check_sharding(optimizer, self._inner_group, settings, self._optimizers)
        self._collectives.join(next(optimizer.members())[1].device)
        if holds_shards(optimizer):
            optimizer.shards = self._collectives.hold_shards()
        else:
            optimizer.shared_work = self._collectives.share_work()
        if not self._optimizers:
            self._configure(settings, self._parameters)
            if settings.lag or settings.overlap:
                # Without delays a step's collective is one all-reduce, and can be counted as such from outside.
                self._collectives.send_to_each()

    def _register(self, optimizer: CurvaDion, anew: bool) -> None:
        """Take part in the steps of an optimizer.

        Args:
            optimizer: It has been compared with the others.
            anew: Whether its parameters are equal on all replicas, and displacements begin here.
        """
        self._optimizers.append(optimizer)
        self._untrained.exclude(parameter for _, parameter in optimizer.named_parameters())
        if optimizer.trigger.watches_drift:
            self.agreement.carries_drift = True
            self._parameters.keep_anchors(optimizer)
            self._displacement_meters[optimizer] = DisplacementMeter(self._parameters.anchors, optimizer.shards)
        if anew:
            self._parameters.capture_anchors(optimizer)
            if self.world_size == 1:
                # A lone replica needs none until others come.
                self._parameters.anchors.drop(parameter for _, parameter in optimizer.named_parameters())

    def _open_groups(self) -> None:
        """Open the process groups of what runs beside other collectives, after the first optimizer has begun."""
        if self.world_size > 1 and len(self._optimizers) == 1:
            self.agreement.use_several_groups()
            if self.settings.overlap:
                self._background = self._collectives.in_group_of_its_own()

    def regroup(self, trained: int) -> None:
        """Go on in another default process group, after replicas were lost or have come; every rank calls it.

        What was under way is given up. The first ranks go on from the last consensus if they have the same one, and
        the others begin there. If not, all take over the exact mean of the first ones (``regrouping.py``).

        Args:
            trained: So many ranks, from 0 on, have trained before. The values of the others count for nothing.

        Raises:
            ValueError: Replicas of several processes. Where none has trained, replicas that differ. Where others have,
                this replica would take over numbers that are not finite.
            ReplicaLostError: One more is lost. Regroup again.
        """
        if self._pace is not None:
            raise ValueError(
                "regroup without heterogeneous=True: replicas that were lost leave the others in different steps"
            )
        if self._inner_group is not None:
            raise ValueError("regroup replicas of one process: of a replica of several, none can be lost alone")
        optimizers, self._optimizers = self._optimizers, []
        request = self.agreement.stop_request
        self._sent_before = self.bytes_sent
        self._start_anew(self._parameters)
        self.agreement.stop_request = request
        try:
            if trained:
                self._go_on(optimizers, trained)
            else:
                for optimizer in optimizers:
                    self._join(optimizer)
                self.take_from_rank_0({**self._untrained.parameters_outside(), **self._untrained.buffers()})
        finally:
            # All of them, where one more replica is lost on the way.
            self._optimizers = optimizers

    def _go_on(self, optimizers: Sequence[CurvaDion], trained: int) -> None:
        regrouping: Regrouping | None = None
        for optimizer in optimizers:
            self._enter_group(optimizer)
            regrouping = regrouping or Regrouping(
                self.settings, self._collectives, self._parameters, self._untrained, trained, self._arrival
            )
            self._register(optimizer, anew=not regrouping.join(optimizer))
            self._open_groups()
        if regrouping is not None:
            regrouping.hand_over_untrained()
        self._arrival = None

    def take_from_rank_0(self, tensors: dict[str, Tensor]) -> None:
        """Let tensors be those of rank 0.

        Sent is what is not equal already, as it is where every process has built the model from one seed.

        Args:
            tensors: By name, the same on every rank.
        """
        self._collectives.broadcast(list(self._collectives.differing(tensors).values()))
