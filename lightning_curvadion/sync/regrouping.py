"""Regrouping: what replicas send each other when they form a new group, after some were lost or have come.

Between two syncs replicas need nobody, so a loss takes nothing but the lost replica's own work. The others go on from
the anchors, the last consensus, if all of them have the same ones. They have, unless the loss cut a mean in half. Each
keeps what it has walked, what quantization has kept back, and its momenta. Of those parameters whose anchors differ the
exact mean is taken.

A replica that comes begins at the anchors, with the optimizer state of rank 0, if it has not received both before
(``transfer_to_newcomers.py``). It has walked nothing. What the others have to send by then counts more in the next
mean, which is what it would have been without the new one.

Where no common anchors are kept, or a sync step does not reconcile all, the replicas take an exact consensus. Those
that come take it over.
"""

from collections.abc import Collection, Mapping
from datetime import timedelta

import torch
from torch import Tensor

from ..optim.curvadion import CurvaDion
from ..optim.optimizer_state import set_step_counts, state_tensors
from .consensus import Consensus
from .digests import digest
from .outer_step import OuterStep
from .parameter_payloads import ParameterPayloads
from .payload_collectives import PayloadCollectives
from .payloads import TensorPayload, displacement_of
from .settings import SyncSettings
from .transfer_to_newcomers import Arrival
from .untrained_tensors import UntrainedTensors

# Of a collective, where its backend does not tell.
_TIMEOUT = timedelta(seconds=30)


class Regrouping:
    """A new group of replicas.

    Args:
        settings: Of the hook.
        collectives: Of the group.
        parameters: Makes the payloads of parameters.
        untrained: Tensors of the module that no step trains.
        trained: The first so many ranks have trained before; at least one.
        arrival: What this replica has received before it came.

    Attributes:
        went_on: Whether no optimizer so far has needed an exact consensus.
    """

    def __init__(
        self,
        settings: SyncSettings,
        collectives: PayloadCollectives,
        parameters: ParameterPayloads,
        untrained: UntrainedTensors,
        trained: int,
        arrival: Arrival | None,
    ) -> None:
        self._settings, self._collectives, self._parameters = settings, collectives, parameters
        self._untrained, self._trained = untrained, trained
        self._has_trained = collectives.rank < trained
        self._newcomers = range(trained, collectives.world_size)
        # Those that have not received the model before.
        self._behind: set[int] = set()
        self.went_on = True
        self._groups: dict[tuple[int, ...], PayloadCollectives] = {}
        self._arrival = arrival
        if self._newcomers and not self._is_complete():
            self._arrival = None
        self._number = 0

    def _is_complete(self) -> bool:
        """Whether this replica has received all that rank 0 has recorded: nothing more is recorded from here on."""
        recorder = self._parameters.anchors.recorder if self._collectives.rank == 0 else None
        position = torch.zeros(2, dtype=torch.int64)
        if recorder is not None:
            recorder.close()
            position = torch.tensor([recorder.identity, recorder.count])
        position = position.to(device=self._collectives.device)
        self._collectives.broadcast([position])
        # The others wait for it meanwhile.
        timeout = (self._collectives.timeout or _TIMEOUT) / 2
        return self._arrival is not None and self._arrival.is_complete(position.tolist(), timeout)

    def join(self, optimizer: CurvaDion) -> bool:
        """Begin with an optimizer of all replicas.

        Returns:
            Whether its displacements go on. Its parameters are equal on all replicas otherwise.

        Raises:
            ValueError: This replica would take over a number that is not finite.
            ReplicaLostError: One more is lost.
        """
        parameters = dict(optimizer.named_parameters())
        self._create_outer_momenta(optimizer)
        if not self._has_trained:
            for parameter in parameters.values():
                optimizer.state[parameter].pop("residual", None)
            if self._arrival is not None:
                self._arrival.install(optimizer, self._number, self._parameters)
        self._number += 1
        rows = self._collectives.all_gather(self._row(optimizer)).cpu()
        goes_on, arrived, digests, anchored = rows.split([1, 1, len(parameters), len(parameters)], dim=1)
        if not bool(goes_on[: self._trained].all()):
            self.went_on = False
            self._take_exact_consensus(optimizer)
            return False
        columns = dict(zip(parameters.items(), digests.T, strict=True))
        differing = {name: p for (name, p), own in columns.items() if len(own[: self._trained].unique()) > 1}
        if differing:
            self._average_by_value(optimizer, differing)
        has_anchor = (anchored[: self._trained] > 0).any(dim=0).tolist()
        if self._parameters.needs_anchors(optimizer):
            moved = [p for p, kept in zip(parameters.values(), has_anchor, strict=True) if kept or p in differing]
        else:
            moved = [p for name, p in parameters.items() if p.requires_grad or name in differing]
        if self._newcomers:
            self._behind |= {
                rank
                for rank in self._newcomers
                if differing or not arrived[rank] or not torch.equal(rows[rank, 2:], rows[0, 2:])
            }
            self._hand_over(optimizer, moved)
        self._parameters.begin(optimizer, moved, is_newcomer=not self._has_trained)
        optimizer.replicas_share_state(False)
        return True

    def hand_over_untrained(self) -> None:
        """Give those that come what no optimizer trains, as it is on rank 0."""
        tensors = {**self._untrained.parameters_outside(), **self._untrained.buffers()}
        if not self.went_on:
            self._collectives.broadcast(list(self._collectives.differing(tensors).values()))
            return
        if self._arrival is not None and self._collectives.rank not in self._behind:
            self._arrival.install_untrained(self._untrained)
        self._give(tensors, self._behind)

    def _row(self, optimizer: CurvaDion) -> Tensor:
        """What this replica tells of an optimizer.

        Whether it goes on, whether it has received the model before, digests, and which parameters have anchors.
        """
        anchors = self._parameters.anchors
        # Replicas that take different numbers of steps would go on with weights of the lost one's.
        reconciled = self._settings.consensus == "average" and not self._settings.heterogeneous
        goes_on = reconciled and self._trained > 1 and self._parameters.are_whole(optimizer)
        if self._newcomers:
            keeps_back = self._parameters.needs_anchors(optimizer) and self._parameters.are_quantized(optimizer)
            goes_on = goes_on and keeps_back
        digests, anchored = [], []
        for _, parameter in optimizer.named_parameters():
            anchored.append(not anchors.missing([parameter]))
            if anchored[-1]:
                velocity = optimizer.state[parameter].get("outer_momentum", torch.empty(0))
                digests.append(digest(anchors.of(parameter)).cpu() + 3 * digest(velocity).cpu())
            else:
                digests.append(torch.tensor(0) if parameter.requires_grad else digest(parameter).cpu())
        arrived = self._arrival is not None
        own = [torch.tensor([goes_on, arrived]), torch.stack(digests), torch.tensor(anchored)]
        return torch.cat([part.to(torch.int64) for part in own]).to(device=self._collectives.device)

    def _create_outer_momenta(self, optimizer: CurvaDion) -> None:
        """A replica that comes has made no outer step, and is to receive the momentum of one."""
        if self._settings.has_outer_step:
            for _, parameter in optimizer.named_parameters():
                OuterStep(optimizer.state[parameter], parameter, self._settings.outer_lr, self._settings.outer_momentum)

    # -- the replicas that have trained ------------------------------------------------------------------------------

    def _survivors(self) -> PayloadCollectives:
        return self._collectives.among(range(self._trained))

    def _add_residuals(self, optimizer: CurvaDion, parameters: Mapping[str, Tensor]) -> None:
        for parameter in parameters.values():
            kept_back = optimizer.state[parameter].pop("residual", None)
            if kept_back is not None:
                parameter.detach().add_(kept_back)

    def _average_by_value(self, optimizer: CurvaDion, differing: Mapping[str, Tensor]) -> None:
        """Take the mean of parameters whose anchors a loss has left unequal."""
        survivors = self._survivors()
        if not self._has_trained:
            return
        self._add_residuals(optimizer, differing)
        velocities = {
            name: state["outer_momentum"]
            for name, parameter in differing.items()
            if "outer_momentum" in (state := optimizer.state[parameter])
        }
        survivors.average(
            [
                *self._parameters.by_value(optimizer, differing),
                *(TensorPayload(f"outer momentum of {name}", velocity) for name, velocity in velocities.items()),
            ]
        )
        self._parameters.arrived(optimizer)

    def _take_exact_consensus(self, optimizer: CurvaDion) -> None:
        """Make all replicas one model at full width: the mean of those that have trained."""
        survivors = self._survivors()
        if self._has_trained:
            self._add_residuals(optimizer, dict(optimizer.named_parameters()))
            Consensus(survivors, self._parameters, self._untrained).reach([optimizer], include_state=True)
        state = state_tensors(optimizer)
        taken = self._collectives.differing({**dict(optimizer.named_parameters()), **state})
        self._collectives.broadcast(list(taken.values()))
        if not self._has_trained:
            verify_finite(taken)
        set_step_counts(optimizer, state)
        optimizer.replicas_share_state()

    # -- the replicas that come --------------------------------------------------------------------------------------

    def _hand_over(self, optimizer: CurvaDion, moved: list[Tensor]) -> None:
        """Let those that come begin at the anchors, with the optimizer state of rank 0."""
        anchors, parameters = self._parameters.anchors, dict(optimizer.named_parameters())
        is_behind = self._collectives.rank in self._behind
        if is_behind:
            anchors.drop(parameters.values())
            anchors.capture(moved)
        state = state_tensors(optimizer)
        kept = {name: anchors.of(p) if p in set(moved) else p for name, p in parameters.items()}
        taken = self._give({**kept, **state}, self._behind)
        if self._has_trained:
            self._weigh(optimizer, self._collectives.world_size / self._trained)
        if not is_behind:
            return
        verify_finite(taken)
        for parameter in moved:
            parameter.detach().copy_(anchors.of(parameter))
        set_step_counts(optimizer, state)

    def _weigh(self, optimizer: CurvaDion, weight: float) -> None:
        """Let the next mean count so many times what this replica has to send by now. Its parameters stay."""
        anchors = self._parameters.anchors
        for _, parameter in optimizer.named_parameters():
            if not anchors.missing([parameter]):
                walked = displacement_of(parameter.detach(), anchors.of(parameter))
                residual = self._parameters._residual(optimizer.state[parameter], parameter)
                residual.copy_((walked + residual).mul_(weight).sub_(walked))

    def _give(self, tensors: Mapping[str, Tensor], receivers: Collection[int]) -> dict[str, Tensor]:
        """Rank 0's tensors, in some of the replicas that come: those that were not equal."""
        ranks = (0, *sorted(receivers))
        if receivers and ranks not in self._groups:
            self._groups[ranks] = self._collectives.among(ranks)
        if not receivers or self._collectives.rank not in ranks:
            return {}
        group = self._groups[ranks]
        differing = group.differing(tensors)
        group.broadcast(list(differing.values()))
        return differing


def verify_finite(tensors: Mapping[str, Tensor]) -> None:
    """Check what a replica takes over from another one.

    Raises:
        ValueError: A number is not finite, naming its tensor.
    """
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"end the run and go on from its newest checkpoint: {name}, which this replica was to take over from"
                " rank 0, holds numbers that are not finite"
            )
