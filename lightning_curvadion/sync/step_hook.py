"""StepHook: what a CurvaDion asks of its sync hook in a step.

The agreement is in ``agreement.py``, what a sync step sends in ``sync_step.py``, and a mean in the background in
``overlap.py``. This class joins them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.profiler import record_function

from ..optim.curvadion import CurvaDion
from ..optim.optimizer_state import trainable_parameters
from .agreement import Agreed, Agreement
from .consensus import Consensus
from .displacement_meter import DisplacementMeter
from .overlap import Overlap
from .pace import Pace
from .paced_agreement import PacedAgreement
from .parameter_payloads import ParameterPayloads
from .payload_collectives import PayloadCollectives
from .settings import SyncSettings, resolve_settings
from .sharded_replicas import ShardedReplicaCollectives
from .sync_step import SyncStep
from .two_levels import InnerProcesses
from .untrained_tensors import UntrainedTensors


class StepHook:
    """Communicates in the steps of optimizers; implements ``optim/sync_hook.py``.

    Args:
        arguments: Of ``resolve_settings``.
        group: Process group of the replicas; ``None`` is the default group.
        inner_group: The processes of this replica, where it has several.

    Attributes:
        settings: The checked arguments.
        agreement: The all-reduce of every step.

    Raises:
        ValueError: On a bad argument.
    """

    def __init__(
        self, arguments: Mapping[str, Any], group: ProcessGroup | None, inner_group: ProcessGroup | None
    ) -> None:
        self._arguments = arguments
        self._group, self._inner_group = group, inner_group
        self._untrained = UntrainedTensors()
        self._optimizers: list[CurvaDion] = []
        self._start_anew()

    def _start_anew(self, before: ParameterPayloads | None = None) -> None:
        """Begin where no process group has been used.

        Args:
            before: In an earlier process group: all that is known of other replicas.
        """
        self._collectives = self._make_collectives(self._group, self._arguments["chunk"])
        # Of the means that run in the background.
        self._background: PayloadCollectives | None = None
        self._pace = Pace() if self._arguments["heterogeneous"] else None
        self.agreement = (
            Agreement(self._collectives, self._arguments["lag"])
            if self._pace is None
            else PacedAgreement(self._collectives, self._pace)
        )
        self._stepping: CurvaDion | None = None
        # Of the optimizers whose trigger watches the drift.
        self._displacement_meters: dict[CurvaDion, DisplacementMeter] = {}
        self._configure(resolve_settings(**self._arguments), before)

    def _configure(self, settings: SyncSettings, before: ParameterPayloads | None) -> None:
        self.settings = settings
        self._momentum = settings.momentum
        self._sync_rank_fraction = settings.sync_rank_fraction
        self._averages_vector_gradients = settings.consensus == "none"
        self._lag = settings.lag
        self._parameters = ParameterPayloads(settings, *self._collectives.place_inside, self._pace)
        if before is not None:
            self._parameters.resume(before)
        self._sync_step = SyncStep(settings, self._collectives, self._parameters, self._untrained)
        self._consensus = Consensus(self._collectives, self._parameters, self._untrained)
        self._overlap = Overlap(settings.overlap, self._parameters, self._sync_step)

    def _make_collectives(self, group: ProcessGroup | None, chunk: int) -> PayloadCollectives:
        if self._inner_group is None:
            return PayloadCollectives(group, chunk)
        if group is None:
            raise ValueError(
                "give group as well as inner_group: inner_group holds the processes of this replica, group this process"
                " and its counterparts in the other replicas"
            )
        return ShardedReplicaCollectives(group, InnerProcesses(self._inner_group, chunk), chunk)

    @property
    def rank(self) -> int:
        """This replica."""
        return self._collectives.rank

    @property
    def world_size(self) -> int:
        """Number of replicas."""
        return self._collectives.world_size

    @property
    def global_step(self) -> float:
        """Mean of the replicas' steps so far, for ``heterogeneous=True``.

        It moves on in the steps that act on an agreement, and is the same on all replicas after the same one. Let
        learning rates follow it, and not the steps of a replica. All replicas end their loops, or reach a consensus,
        where it says so; the same holds for collectives of your own in this process group. Set it where a run resumes,
        on all replicas.

        Raises:
            ValueError: Without ``heterogeneous=True``, where the steps of a loop say as much.
        """
        return self._counted().global_step

    @global_step.setter
    def global_step(self, value: float) -> None:
        self._counted().resume(value)

    def _counted(self) -> Pace:
        if self._pace is None:
            raise ValueError("count the steps yourself, or use heterogeneous=True: all replicas take the same ones")
        return self._pace

    @property
    def _places(self) -> Sequence[str]:
        """What errors call the replicas."""
        return self._collectives.places

    # -- a step -----------------------------------------------------------------------------------------------------

    def _before_step(self, optimizer: CurvaDion) -> None:
        self._stepping = optimizer
        self._consensus.lose(optimizer)
        if self._parameters.meter is not None:
            self._parameters.meter.start()
        if self.world_size > 1 and self.settings.consensus != "none":
            self.agreement.settle_request = self._wants_to_settle(optimizer)
            self._parameters.record_step(optimizer)

    def _wants_to_settle(self, optimizer: CurvaDion) -> bool:
        """Whether this replica asks the others to settle, prepared to do so where its parameters are now."""
        unsettled = self.settings.consensus != "none" and self._consensus.is_unsettled(optimizer)
        if unsettled:
            self._consensus.prepare_to_settle(optimizer)
        return unsettled

    def _agree(self, signal: Tensor) -> Agreed:
        """The element-wise maximum of ``signal`` over the replicas, and of their drift: all that a local step sends.

        With a lag, that of the step before. Where a replica's parameters were set to something else, all settle theirs.
        """
        optimizer = self._stepping
        assert optimizer is not None
        lag = self._lag if self.world_size > 1 else 0
        if not lag:
            self.agreement.start(optimizer, signal, self._own_drift())
        agreed = self.agreement.take(optimizer)
        self._settle_where_agreed(optimizer)
        if lag and agreed.code < 1:
            self.agreement.settle_request = self._wants_to_settle(optimizer)
            self.agreement.start(optimizer, signal, self._own_drift())
        if self.settings.momentum == "displacement":
            # After it settled: displacements that start anew consist of this step.
            self._parameters.record_learning_rates(optimizer)
        return agreed

    def _confirm(self) -> float:
        """With a lag, wait for the agreement of this step where a sync step writes means beside its own step."""
        return 0.0 if self.settings.sends_parameters_alone else self._confirm_step()

    def _confirm_step(self) -> float:
        """The largest code of this step, below 1 if none is unusable; 0 where it was read without a lag."""
        if not self._lag:
            return 0.0
        assert self._stepping is not None
        code = self.agreement.confirm(self._stepping)
        self._settle_where_agreed(self._stepping)
        return code

    def _settle_where_agreed(self, optimizer: CurvaDion) -> None:
        if self.agreement.agreed_to_settle:
            with record_function("curvadion::consensus"):
                self._consensus.settle(optimizer)

    def _agreed_so_far(self, optimizer: CurvaDion) -> list[tuple[float, float]]:
        """RMMC and drift that the next steps act on, with a lag: of the last ones."""
        # One process of several may ask alone, and could read no more than it has. A consensus before has read all.
        read = self.agreement.read if self._inner_group is None else self.agreement.arrived
        return [(agreed.rmmc, agreed.drift) for agreed in read(optimizer)]

    def _resume(self, optimizer: CurvaDion, agreed: Sequence[tuple[float, float]]) -> None:
        """Let the next steps act on the agreements of a loaded state."""
        if self._lag and self.world_size > 1:
            self.agreement.resume(optimizer, [Agreed(rmmc, 0.0, drift) for rmmc, drift in agreed[-self._lag :]])

    def _own_drift(self) -> Tensor | None:
        """The drift of this replica as its trigger wants it, shape (1,); ``None`` where nobody watches it.

        ``None`` also where all parameters are frozen, where a mean is under way that will end the drift, and where
        anchors are missing, as after a state was loaded: the replicas settle in this step then.
        """
        optimizer = self._stepping
        if optimizer is None or optimizer not in self._displacement_meters or self._overlap.under_way(optimizer):
            return None
        parameters = list(trainable_parameters(optimizer).values())
        if not parameters or self._parameters.anchors.missing(parameters):
            return None
        with record_function("curvadion::drift"):
            drift = self._displacement_meters[optimizer].measure(parameters)
            return drift * optimizer.trigger.drift_factor(float(optimizer.param_groups[0]["lr"]))

    def _mean_left(self, optimizer: CurvaDion, factors: Sequence[Tensor], whole: Sequence[Tensor]) -> list[Tensor]:
        """The first mean of a sync step."""
        if self.settings.sends_parameters_alone and self._background is None:
            # After the replica's own step, in which the agreement has arrived.
            optimizer._raise_if_unusable(self._confirm_step())
        return self._sync_step.mean_left(optimizer, factors, whole)

    def _mean_right(self, optimizer: CurvaDion, factors: Sequence[Tensor], whole: Sequence[Tensor]) -> list[Tensor]:
        """The second mean of a sync step, parameters and buffers included."""
        if self._background is not None:
            self._overlap.start(optimizer, self._background)
            return []
        means = self._sync_step.mean_right(optimizer, factors, whole)
        self._parameters.arrived(optimizer)
        if self.settings.consensus == "average" and self.settings.spread == 1:
            self._consensus.reached_in_step(optimizer)
        return means

    @property
    def _reads_agreement(self) -> bool:
        """Whether the present step acts on an agreement: always, where no replica is ahead of another."""
        return self.agreement.acted

    def _may_sync(self, optimizer: CurvaDion) -> bool:
        """Whether a mean could start in this step: one that is under way would have to be waited for."""
        return self._overlap.may_start(optimizer)

    def _corrects_momenta(self, optimizer: CurvaDion, synced: bool) -> bool:
        """Whether a mean of displacements arrives in this step, and the momenta are corrected by it."""
        arrives = synced if self._background is None else self._ends_flight(optimizer)
        return arrives and self.settings.momentum == "displacement"

    def _proceed(self, optimizer: CurvaDion) -> None:
        """Go on with a mean in the background, all replicas at the same agreement."""
        if self.agreement.acted:
            self._overlap.proceed(optimizer)

    def _ends_flight(self, optimizer: CurvaDion) -> bool:
        return self.agreement.acted and self._overlap.ends_in_this_step(optimizer)
