"""What parameters send: themselves, or their displacement from the last consensus with error feedback."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from ..optim.curvadion import CurvaDion
from ..optim.momentum_correction import Correction, corrects
from ..optim.optimizer_state import trainable_parameters
from ..optim.shards import is_sharded, local_of
from .anchors import Anchors
from .corrections import correct_all
from .digests import digest
from .drift import DriftMeter
from .due_parameters import DueParameters
from .outer_step import OuterStep
from .pace import Pace, Weight
from .payloads import DisplacementPayload, Payload, TensorPayload, has_sparse_rows, share_of_parameter
from .quantization import BLOCK_FORMATS
from .rotation import rotation_part
from .settings import SyncSettings, has_small_groups
from .sparse_rows import SparseRowsPayload, row_distances
from .travel import Travel

RowsToSend = Callable[[Sequence[Tensor]], Sequence[Tensor]]
StandIns = Mapping[Tensor, Tensor]


class ParameterPayloads:
    """Makes the payloads of parameters.

    Args:
        settings: Of the hook.
        process: This process, among those of its replica.
        processes: Of a replica.
        pace: Counts steps, where replicas take different numbers of them.

    Attributes:
        anchors: The last consensus, where the settings or a trigger need it.
        meter: Measures the drift; ``None`` until it is asked for.
    """

    def __init__(self, settings: SyncSettings, process: int = 0, processes: int = 1, pace: Pace | None = None) -> None:
        self._settings = settings
        self._pace = pace
        self._process, self._processes = process, processes
        self.anchors = Anchors()
        self.meter: DriftMeter | None = None
        # Parameters that have stepped since their last sync step.
        self._moved: dict[CurvaDion, set[Tensor]] = {}
        self._travel = Travel()
        # Optimizers whose anchors are zero until the mean of their values arrives.
        self._sent_by_value: set[CurvaDion] = set()
        # Optimizers whose anchors are needed, whatever the settings.
        self._anchored: set[CurvaDion] = set()

    # -- anchors -----------------------------------------------------------------------------------------------------

    def keep_anchors(self, optimizer: CurvaDion) -> None:
        """Let the parameters of an optimizer have anchors, and so travel as displacements, whatever the settings."""
        self._anchored.add(optimizer)

    def needs_anchors(self, optimizer: CurvaDion) -> bool:
        """Whether the parameters of an optimizer have anchors."""
        return self._settings.needs_anchors or optimizer in self._anchored

    def capture_anchors(self, optimizer: CurvaDion) -> None:
        """Measure displacements from here on. All replicas must hold the same parameters now."""
        self._moved.pop(optimizer, None)
        self.arrived(optimizer)
        self._travel.restart(parameter for _, parameter in optimizer.named_parameters())
        if self._pace is not None:
            self._pace.restart()
        if self.needs_anchors(optimizer):
            self.anchors.drop(parameter for _, parameter in optimizer.named_parameters())
            self.anchors.capture(trainable_parameters(optimizer).values())

    def lack_anchors(self, optimizer: CurvaDion) -> bool:
        """Whether a parameter that needs an anchor has none, as after it was unfrozen or added."""
        parameters = trainable_parameters(optimizer).values()
        return self.needs_anchors(optimizer) and self.anchors.missing(parameters)

    def anchors_digest(self, optimizer: CurvaDion) -> Tensor | None:
        """A digest of the anchors of an optimizer's parameters, int64; ``None`` where one that is needed is missing."""
        if self.lack_anchors(optimizer):
            return None
        parameters = trainable_parameters(optimizer).values() if self.needs_anchors(optimizer) else ()
        digests = [digest(self.anchors.of(parameter)) for parameter in parameters]
        return torch.stack(digests) if digests else torch.zeros(1, dtype=torch.int64)

    # -- another process group ---------------------------------------------------------------------------------------

    def resume(self, before: "ParameterPayloads") -> None:
        """Go on with the displacements of an earlier process group, whose mean under way is given up."""
        self.anchors, self.meter = before.anchors, before.meter
        self._travel, self._sent_by_value, self._anchored = before._travel, before._sent_by_value, before._anchored
        self._travel.give_up()

    def are_whole(self, optimizer: CurvaDion) -> bool:
        """Whether all displacements are known, as they are unless parameters were set to something else."""
        return optimizer not in self._sent_by_value and not self.lack_anchors(optimizer)

    def are_quantized(self, optimizer: CurvaDion) -> bool:
        """Whether every displacement has a residual."""
        return all(wire_format != "float32" for wire_format in self._wire_formats(optimizer).values())

    def begin(self, optimizer: CurvaDion, moved: Iterable[Tensor], is_newcomer: bool) -> None:
        """Begin in a group whose replicas agree on which parameters have moved since their last sync step."""
        self._moved[optimizer] = set(moved)
        if is_newcomer:
            self._travel.leave_out(self._moved[optimizer])

    # -- payloads ----------------------------------------------------------------------------------------------------

    def record_step(self, optimizer: CurvaDion) -> None:
        """Note that the trainable parameters of an optimizer step now."""
        self._moved.setdefault(optimizer, set()).update(trainable_parameters(optimizer).values())

    def record_learning_rates(self, optimizer: CurvaDion) -> None:
        """Note the learning rates of the step that comes: they say which momentum makes which displacement."""
        self._travel.add(optimizer)

    def arrived(self, optimizer: CurvaDion) -> None:
        """Note that the mean of all that was sent has arrived."""
        self._travel.arrived(optimizer)
        self._sent_by_value.discard(optimizer)

    def forget(self, optimizer: CurvaDion, parameters: Iterable[Tensor]) -> None:
        """Note that parameters were set to something else, of which nothing is left to send."""
        parameters = list(parameters)
        self._travel.restart(parameters)
        for parameter in parameters:
            self._moved.get(optimizer, set()).discard(parameter)
            optimizer.state[parameter].pop("residual", None)

    def untrained(self, optimizer: CurvaDion) -> dict[str, Tensor]:
        """Frozen parameters of an optimizer, without those of which :meth:`of_sync_step` still sends something."""
        moved = self._moved.get(optimizer, set())
        return {
            f"frozen {name}": parameter
            for name, parameter in optimizer.named_parameters()
            if not parameter.requires_grad and parameter not in moved and "residual" not in optimizer.state[parameter]
        }

    def due(self, optimizer: CurvaDion, leave_out: Collection[Tensor] = ()) -> DueParameters:
        """What a sync step sends: what has moved since its last one.

        Where the sync is spread over several steps, only the parameters whose turn it is. A parameter that was frozen
        meanwhile still sends what it moved. At its next turn it sends what quantization left of it, at full width, and
        from then on nothing.

        Args:
            optimizer: It steps now.
            leave_out: Parameters that are synchronised otherwise.
        """
        self.record_step(optimizer)
        named = {name: parameter for name, parameter in optimizer.named_parameters() if parameter not in leave_out}
        named = rotation_part(named, self._settings.spread, optimizer.sync_steps)
        moved = self._moved[optimizer] & set(named.values())
        self._moved[optimizer] -= moved
        moving = {name: parameter for name, parameter in named.items() if parameter in moved}
        resting = {name: p for name, p in named.items() if p not in moved and "residual" in optimizer.state[p]}
        self.anchors.drop(p for name, p in named.items() if name not in {**moving, **resting})
        matrices = {p for group, p in optimizer.members() if group["algorithm"] == "dion"}
        formats = self._wire_formats(optimizer)
        sparse = {name: p for name, p in moving.items() if p not in matrices and self._sends_rows(p, formats[p])}
        dense = {name: p for name, p in moving.items() if name not in sparse}
        return DueParameters(dense, sparse, resting, self._weight())

    def _weight(self) -> Weight | None:
        """The weight of this replica in the mean that comes."""
        return self._pace.weight() if self._pace is not None else None

    def of_sync_step(
        self, optimizer: CurvaDion, rows_to_send: RowsToSend, leave_out: Collection[Tensor] = ()
    ) -> list[Payload]:
        """The payloads of a sync step, in the wire formats.

        Args:
            optimizer: It steps now.
            rows_to_send: ``Collectives.rows_to_send``, called where rows may be at rest.
            leave_out: Parameters that are synchronised otherwise.
        """
        due = self.due(optimizer, leave_out)
        dense = self.of(optimizer, due.dense, correct=True, weight=due.weight)
        rows = rows_to_send(self.row_distances(optimizer, due.sparse)) if due.sparse else []
        of_rows = self.of_rows(optimizer, due.sparse, rows, weight=due.weight)
        return [*dense, *of_rows, *self.of_resting(optimizer, due.resting)]

    def _wire_formats(self, optimizer: CurvaDion) -> dict[Tensor, str]:
        """The formats in which the parameters of an optimizer travel in a sync step."""
        small = has_small_groups(optimizer)
        return {
            parameter: self._settings.format_of(parameter, matrix=group["algorithm"] == "dion", in_small_groups=small)
            for group, parameter in optimizer.members()
        }

    def _sends_rows(self, parameter: Tensor, wire_format: str) -> bool:
        """Whether only those rows of a parameter travel that have moved."""
        # An outer step moves all rows. At full width there is no residual that could take up what the others moved.
        return has_sparse_rows(parameter) and wire_format in BLOCK_FORMATS and not self._settings.has_outer_step

    def row_distances(
        self, optimizer: CurvaDion, parameters: Mapping[str, Tensor], stand_ins: StandIns | None = None
    ) -> list[Tensor]:
        """How far the rows of parameters have moved on this replica. Their displacements start anew.

        Args:
            optimizer: Of the parameters.
            parameters: By name.
            stand_ins: As for :meth:`of`.
        """
        if self.meter is not None and not stand_ins:
            self.meter.start()
        self._travel.send(optimizer, parameters.values())
        return [
            row_distances(
                local_of((stand_ins or {}).get(p, p)),
                self.anchors.to_move(p),
                self._residual(optimizer.state[p], p),
                self._first(p) // p.shape[1],
            )
            for p in parameters.values()
        ]

    def of_rows(
        self,
        optimizer: CurvaDion,
        parameters: Mapping[str, Tensor],
        rows: Sequence[Tensor],
        stand_ins: StandIns | None = None,
        weight: Weight | None = None,
    ) -> list[Payload]:
        """The payloads of the rows that have moved on any replica.

        Their momenta are not corrected: a row that waited has moved for longer than the steps since the last sync.

        Args:
            optimizer: Of the parameters.
            parameters: By name.
            rows: Indices of the rows that travel, for each parameter.
            stand_ins: As for :meth:`of`.
            weight: As for :meth:`of`.
        """
        formats = self._wire_formats(optimizer)
        payloads: list[Payload] = []
        for (name, p), travelling in zip(parameters.items(), rows, strict=True):
            values, residual = (stand_ins or {}).get(p, p), self._residual(optimizer.state[p], p)
            anchor = self.anchors.to_move(p)
            first = self._first(p) // p.shape[1]
            payload = SparseRowsPayload(
                name, values, anchor, residual, travelling, formats[p], self.meter, first, weight
            )
            payload.origin = self.anchors, p
            payloads.append(payload)
        return payloads

    def of_resting(
        self, optimizer: CurvaDion, parameters: Mapping[str, Tensor], stand_ins: StandIns | None = None
    ) -> list[Payload]:
        """The payloads of what quantization has left of parameters that no longer move, at full width."""
        return self.of(optimizer, parameters, "float32", flush_residuals=True, stand_ins=stand_ins)

    def of_consensus(self, optimizer: CurvaDion, stepped: bool, by_value: bool) -> list[Payload]:
        """The payloads of an exact consensus, at full width.

        Args:
            optimizer: Of the parameters.
            stepped: Whether it has stepped since the last sync step; only residuals are left to send otherwise.
            by_value: Whether the replicas have no common anchors.
        """
        untrained = set(self.untrained(optimizer).values())
        self._moved.pop(optimizer, None)
        weight = self._weight()
        due = {name: parameter for name, parameter in optimizer.named_parameters() if parameter not in untrained}
        if by_value:
            return self.by_value(optimizer, due)
        if not stepped:
            due = {name: parameter for name, parameter in due.items() if "residual" in optimizer.state[parameter]}
        return self.of(optimizer, due, "float32", flush_residuals=True, outer_step=stepped, weight=weight)

    def by_value(self, optimizer: CurvaDion, parameters: Mapping[str, Tensor]) -> list[Payload]:
        """Payloads of the parameters' values with their residuals, which need no common anchors and no outer step."""
        if self.needs_anchors(optimizer):
            self._sent_by_value.add(optimizer)
            self.anchors.set_to_zero(parameters.values())
        return self.of(optimizer, parameters, "float32", flush_residuals=True, outer_step=False)

    def of(
        self,
        optimizer: CurvaDion,
        parameters: Mapping[str, Tensor],
        wire_format: str | None = None,
        flush_residuals: bool = False,
        outer_step: bool = True,
        correct: bool = False,
        stand_ins: StandIns | None = None,
        weight: Weight | None = None,
    ) -> list[Payload]:
        """The payloads of some parameters.

        Args:
            optimizer: Its state holds residuals and outer momenta.
            parameters: By name.
            wire_format: Format on the wire; a quantized one uses and updates the residuals. ``None`` is what the
                settings say of each parameter.
            flush_residuals: With ``"float32"``, send the residuals too and delete them once the mean has arrived.
            outer_step: Whether an outer step is due.
            correct: Whether the momenta are corrected, where the settings say so.
            stand_ins: Tensors that are read and written in place of parameters that move on meanwhile.
            weight: What their displacements count; ``None`` where all replicas count the same.
        """
        if not parameters:
            return []
        stand_ins = stand_ins or {}
        if self.meter is not None and not stand_ins:
            self.meter.start()
        if not self.needs_anchors(optimizer):
            return [TensorPayload(name, stand_ins.get(p, p), meter=self.meter) for name, p in parameters.items()]
        group_of = {parameter: group for group, parameter in optimizer.members()}
        formats = self._wire_formats(optimizer)
        payloads: list[Payload] = []
        corrections: dict[Tensor, Correction] = {}
        for name, parameter in parameters.items():
            group, state = group_of[parameter], optimizer.state[parameter]
            own_format = wire_format or formats[parameter]
            residual = local_of(state["residual"]) if flush_residuals and "residual" in state else None
            flushed = partial(state.pop, "residual") if residual is not None else None
            if own_format != "float32":
                residual = self._residual(state, parameter)
            step = (
                OuterStep(state, parameter, self._settings.outer_lr, self._settings.outer_momentum)
                if outer_step and self._settings.has_outer_step
                else None
            )
            anchor = self.anchors.to_move(parameter)
            share = self._correction_share(group, own_format) if correct else 0.0
            corrector = partial(correct_all, optimizer, corrections) if share else None
            values = stand_ins.get(parameter, parameter)
            payload = DisplacementPayload(
                name,
                values,
                anchor,
                own_format,
                residual,
                step,
                self.meter,
                corrector,
                self._first(parameter),
                flushed,
                weight,
            )
            payload.origin = self.anchors, parameter
            if share:
                corrections[parameter] = Correction(payload.difference, self._travel.of(parameter), share)
            payloads.append(payload)
        self._travel.send(optimizer, parameters.values())
        return payloads

    def _first(self, parameter: Tensor) -> int:
        """The flat element that this process's residual of a parameter begins with."""
        if is_sharded(parameter):
            return 0
        return share_of_parameter(parameter, self._process, self._processes)[0]

    def _residual(self, state: dict[str, Any], parameter: Tensor) -> Tensor:
        """The error-feedback residual of a parameter, zero at first: of what this process sends of it."""
        shape = parameter.shape
        if self._processes > 1 and not is_sharded(parameter):
            start, stop = share_of_parameter(parameter, self._process, self._processes)
            shape = torch.Size([stop - start])
            if has_sparse_rows(parameter):
                shape = torch.Size([(stop - start) // parameter.shape[1], parameter.shape[1]])
        if "residual" not in state or state["residual"].shape != shape:
            dtype = self._settings.dtype_of_residuals
            state["residual"] = (
                torch.zeros_like(parameter, dtype=dtype, memory_format=torch.contiguous_format)
                if is_sharded(parameter)
                else torch.zeros(shape, dtype=dtype, device=parameter.device)
            )
        return local_of(cast(Tensor, state["residual"]))

    def _correction_share(self, group: dict[str, Any], wire_format: str) -> float:
        """How much of a difference between displacements the momenta of a group take over."""
        share = self._settings.correction_share(wire_format, matrix=group["algorithm"] == "dion")
        return share if corrects(group) else 0.0
