"""ProcessGroupSync: every byte that crosses the network, and its count.

Collectives are called through the ``torch.distributed`` module, so that they can be counted from outside. A local step
makes one all-reduce of 16 bytes. A sync step makes at most three more, of flat buffers that carry the whole model:

===================  ==========================  =====================  ====================================
momentum             first                       second                 third
===================  ==========================  =====================  ====================================
``"factors"``        P, or B where smaller       R
``"dion"``           P, or B where smaller       R
``"average"``        B and Q
``"local"``
===================  ==========================  =====================  ====================================

consensus            first                       second                 third
===================  ==========================  =====================  ====================================
``"average"``                                                           all parameters, buffers
``"factors"``        left displacement factor    right displ. factor    parameters without factors, buffers
``"none"``                                       vector gradients
===================  ==========================  =====================  ====================================
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.profiler import record_function

from . import dion, wire
from .anchors import Anchors, displacement_left_factor, outer_step
from .groups import check_choice
from .optimizer import CurvaDion

CONSENSUS = ("average", "factors", "none")
MOMENTUM = ("factors", "dion", "average", "local")


class ProcessGroupSync:
    """Brings the replicas of a process group together: a sync hook for :class:`~lightning_curvadion.CurvaDion`.

    Works in a plain torch loop, under Fabric, and inside :class:`~lightning_curvadion.CurvaDionStrategy`. One object
    may serve several optimizers of one model.

    Args:
        group: Process group; ``None`` is the default group, which must be initialised when the hook is attached.
        consensus: How parameters come back together at a sync step. ``"average"``: the mean over the replicas,
            afterwards bit-identical on all of them. ``"factors"``: the displacement of each matrix since the last
            consensus goes through factors of the optimizer's rank; cheap and inexact. ``"none"``: not at all, the
            paper's literal method, with the mean gradient for vector groups.
        wire_format: ``"float32"``, or ``"bfloat16"`` for half the bytes: parameters travel as displacements then.
        momentum: What a sync step does to momentum. ``"factors"``: step along the factors of the mean momentum, and the
            part of each replica's momentum in their span becomes the mean's. ``"dion"``: the same factors, and each
            replica keeps its own momentum. ``"average"``: the whole momentum is averaged, and Q with it. ``"local"``:
            nothing, each replica takes its own Dion step (local SGD). Consensus ``"none"`` implies ``"dion"``.
        outer_lr: Learning rate of the outer step on the averaged displacement; 1 takes the average itself.
        outer_momentum: Nesterov momentum of the outer step, as in DiLoCo.

    Memory: a copy of the parameters where ``consensus="factors"``, ``wire_format="bfloat16"`` or an outer step needs
    it, and one more for ``outer_momentum``. During a sync step, one flat buffer of what is sent.

    Attributes:
        bytes_sent: Payload of this replica's collectives so far; an all-reduce of n bytes counts n, a broadcast
            counts n at its source.

    Raises:
        ValueError: On a bad argument, or a combination that would do nothing.
    """

    def __init__(
        self,
        group: ProcessGroup | None = None,
        consensus: str = "average",
        wire_format: str = "float32",
        momentum: str = "factors",
        outer_lr: float = 1.0,
        outer_momentum: float = 0.0,
    ) -> None:
        check_choice("consensus", consensus, CONSENSUS)
        check_choice("wire_format", wire_format, wire.WIRE_FORMATS)
        check_choice("momentum", momentum, MOMENTUM)
        if not outer_lr > 0:
            raise ValueError(f"outer_lr must be > 0, not {outer_lr}; 1.0 takes the average itself")
        if not 0 <= outer_momentum < 1:
            raise ValueError(f"outer_momentum must be in [0, 1), not {outer_momentum}")
        steps_outside = (outer_lr, outer_momentum) != (1.0, 0.0)
        if steps_outside and consensus != "average":
            raise ValueError(f'an outer step needs consensus="average", not {consensus!r}')
        if consensus == "none":
            if momentum not in ("factors", "dion"):
                raise ValueError(f'consensus="none" implies momentum="dion", not {momentum!r}')
            momentum = "dion"
        self.consensus = consensus
        self.wire_format = wire_format
        self.momentum = momentum
        self.outer_lr = outer_lr
        self.outer_momentum = outer_momentum
        self.averages_vector_gradients = consensus == "none"
        self.bytes_sent = 0
        self.rank = 0
        self.world_size = 1
        self._group = group
        self._steps_outside = steps_outside
        self._needs_anchors = (
            consensus == "factors" or steps_outside or (consensus == "average" and wire_format != "float32")
        )
        self._anchors = Anchors()
        self._known: set[Tensor] = set()
        self._buffers: list[Tensor] = []
        # Optimizers that have met since their last step, and whether with their state: once is enough.
        self._met: dict[CurvaDion, bool] = {}
        # Left displacement factors on their way from the first exchange of a sync step to the second.
        self._displacement_P: list[Tensor] = []

    # -- getting together -------------------------------------------------------------------------------------------

    def attach(self, optimizer: CurvaDion) -> None:
        """Check in one collective that all replicas train the same model alike, then broadcast rank 0's values.

        Called by :meth:`CurvaDion.register_sync_hook <lightning_curvadion.CurvaDion.register_sync_hook>`.

        Raises:
            ValueError: No process group, or replicas that differ: on every rank, naming the first difference.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "ProcessGroupSync needs a process group: call torch.distributed.init_process_group first,"
                " start the script with torchrun, or use Trainer(strategy='curvadion')"
            )
        self.rank, self.world_size = dist.get_rank(self._group), dist.get_world_size(self._group)
        parameters = [parameter for _, parameter in optimizer.named_parameters()]
        self._check_equal(self._description(optimizer), parameters[0].device)
        floating, integers = _state_tensors(optimizer)
        self._broadcast(parameters + floating + integers)
        _write_back_steps(optimizer, integers)
        self._known.update(parameters)
        optimizer.register_step_pre_hook(lambda opt, *_: self._before_step(cast(CurvaDion, opt)))
        optimizer.register_load_state_dict_post_hook(lambda opt: self._forget(cast(CurvaDion, opt)))

    def _before_step(self, optimizer: CurvaDion) -> None:
        self._met.pop(optimizer, None)
        if self._needs_anchors:
            self._anchors.capture(_trainable(optimizer))

    def _forget(self, optimizer: CurvaDion) -> None:
        """A state was loaded: the consensus is wherever the parameters are by the next step."""
        self._met.pop(optimizer, None)
        self._anchors.drop(parameter for _, parameter in optimizer.named_parameters())

    def include_module(self, module: nn.Module) -> None:
        """Let the module's persistent buffers take part in every consensus: floating-point ones as means, others
        rank 0's.

        Also broadcasts rank 0's buffers and the parameters that no attached optimizer holds. Call it on every rank,
        after the hook is attached.
        """
        saved = module.state_dict(keep_vars=True)
        self._buffers = [tensor for tensor in saved.values() if not isinstance(tensor, nn.Parameter)]
        rest = [parameter for parameter in module.parameters() if parameter not in self._known]
        everything = [*module.named_parameters(), *module.named_buffers()]
        # Also where this rank has nothing to send: another one may, and would wait for it.
        described = [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in everything]
        self._check_equal(described, everything[0][1].device)
        self._broadcast(rest + list(module.buffers()))

    def _description(self, optimizer: CurvaDion) -> list[str]:
        lines = [
            f"hook consensus={self.consensus} wire_format={self.wire_format} momentum={self.momentum}"
            f" outer_lr={self.outer_lr} outer_momentum={self.outer_momentum}",
            f"trigger {type(optimizer.trigger).__name__} {sorted(vars(optimizer.trigger).items())}",
        ]
        names = optimizer.named_parameters()
        for group in optimizer.param_groups:
            options = {key: group[key] for key in ("algorithm", "rank_fraction", "local_update")}
            for parameter in group["params"]:
                name, _ = next(names)
                state = sorted(optimizer.state[parameter])
                trained = "" if parameter.requires_grad else " frozen"
                lines.append(f"{name} {tuple(parameter.shape)} {parameter.dtype}{trained} {options} {state}")
        return lines

    def _check_equal(self, description: list[str], device: torch.device) -> None:
        digest = hashlib.sha256("\n".join(description).encode()).digest()
        own = torch.tensor(list(digest), dtype=torch.uint8, device=device)
        everyone = [torch.empty_like(own) for _ in range(self.world_size)]
        self.bytes_sent += own.nbytes
        dist.all_gather(everyone, own, group=self._group)
        if all(torch.equal(other, own) for other in everyone):
            return
        descriptions: list[Any] = [None] * self.world_size
        dist.all_gather_object(descriptions, description, group=self._group)
        raise ValueError(_first_difference(descriptions))

    def _broadcast(self, tensors: Sequence[Tensor]) -> None:
        source = 0 if self._group is None else dist.get_global_rank(self._group, 0)
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            alike = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = wire.pack([tensor.detach() for tensor in alike], dtype)
            self.bytes_sent += flat.nbytes if self.rank == 0 else 0
            dist.broadcast(flat, src=source, group=self._group)
            with torch.no_grad():
                for tensor, value in zip(alike, wire.unpack(flat, alike), strict=True):
                    tensor.copy_(value)

    # -- one step ---------------------------------------------------------------------------------------------------

    def agree(self, signal: Tensor) -> None:
        """Replace ``signal``, two float64, by its element-wise maximum over the replicas: all a local step sends."""
        self.bytes_sent += signal.nbytes
        dist.all_reduce(signal, op=dist.ReduceOp.MAX, group=self._group)

    def mean_left(self, optimizer: CurvaDion, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Mean over the replicas of what a sync step exchanges first: left factors, or momentum."""
        if self.consensus != "factors":
            return self._mean(tensors)
        sketches = [displacement_left_factor(self._anchors, stack) for stack in optimizer.matrix_stacks()]
        means = self._mean([*tensors, *sketches])
        self._displacement_P = [dion.orthonormalize(sketch) for sketch in means[len(tensors) :]]
        return means[: len(tensors)]

    def mean_right(self, optimizer: CurvaDion, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Mean over the replicas of what a sync step exchanges second: right factors, gradients of vector groups."""
        if self.consensus != "factors":
            return self._mean(tensors)
        stacks, anchors = optimizer.matrix_stacks(), self._anchors
        own = [
            dion.right_factor(anchors.stacked_displacement(stack), P)
            for stack, P in zip(stacks, self._displacement_P, strict=True)
        ]
        means = self._mean([*tensors, *own])
        for stack, P, own_R, R in zip(stacks, self._displacement_P, own, means[len(tensors) :], strict=True):
            anchors.move_through_factors(stack, P, own_R, R)
        self._displacement_P = []
        return means[: len(tensors)]

    def meet(self, optimizer: CurvaDion) -> None:
        """End of a sync step: the consensus that the third exchange carries."""
        if self.consensus == "none":
            return
        parameters = _trainable(optimizer)
        if self.consensus == "factors":
            factored = {parameter for stack in optimizer.matrix_stacks() for parameter in stack.parameters}
            parameters = [parameter for parameter in parameters if parameter not in factored]
        self._average(optimizer, parameters, self._buffers, self.wire_format)
        if self.consensus == "average":
            self._met[optimizer] = False

    def reach_consensus(self, optimizers: CurvaDion | Iterable[CurvaDion], include_state: bool = False) -> None:
        """Make all replicas one model now, whatever the trigger and the kind of consensus: an average at full width.

        With ``consensus="factors"`` and ``"none"`` too, and for good: the replicas go on from the average. What has met
        already since the last step is not sent again.

        Args:
            optimizers: The attached optimizers, the same in every process.
            include_state: Also average their state, so that a checkpoint of any replica is the checkpoint of all.
                Frozen parameters take part then.
        """
        for optimizer in [optimizers] if isinstance(optimizers, CurvaDion) else optimizers:
            met_state = self._met.get(optimizer)
            if met_state or (met_state is False and not include_state):
                continue
            moved = met_state is None
            optimizer.init_state()
            frozen = [p for _, p in optimizer.named_parameters() if not p.requires_grad] if include_state else []
            parameters = (_trainable(optimizer) if moved else []) + frozen
            state, steps = _state_tensors(optimizer) if include_state else ([], [])
            if self._needs_anchors:
                self._anchors.capture(parameters)
            self._average(optimizer, parameters, [*(self._buffers if moved else ()), *state, *steps], "float32")
            _write_back_steps(optimizer, steps)
            if include_state:
                optimizer.replicas_share_state()
            self._met[optimizer] = include_state

    def _average(
        self, optimizer: CurvaDion, parameters: list[Tensor], others: Sequence[Tensor], wire_format: str
    ) -> None:
        """Bring parameters together in ``wire_format``, and other tensors at full width, integers as rank 0's."""
        anchors = self._anchors if self._needs_anchors else None
        payload = [anchors.displacement(p) if anchors else p.detach() for p in parameters]
        floating = [tensor for tensor in others if tensor.is_floating_point()]
        integers = [tensor for tensor in others if not tensor.is_floating_point()]
        numbers = [wire.integers_to_numbers(tensor) for tensor in integers]
        if self.rank != 0:
            numbers = [torch.zeros_like(number) for number in numbers]
        if wire_format == "float32":
            means = self._mean([*payload, *floating], wire_format, numbers)
        else:
            means = self._mean(payload, wire_format) + self._mean(floating, "float32", numbers)
        split = len(payload), len(payload) + len(floating)
        moves, means, numbers = means[: split[0]], means[split[0] : split[1]], means[split[1] :]
        with torch.no_grad():
            if self._steps_outside:
                states = [optimizer.state[parameter] for parameter in parameters]
                outer_step(moves, states, self.outer_lr, self.outer_momentum)
            for parameter, move in zip(parameters, moves, strict=True):
                if anchors:
                    anchors.move(parameter, move)
                else:
                    parameter.copy_(move)
            for tensor, mean in zip(floating, means, strict=True):
                tensor.copy_(mean)
            for tensor, number in zip(integers, numbers, strict=True):
                tensor.copy_(wire.numbers_to_integers(number, like=tensor))

    def _mean(
        self, tensors: Sequence[Tensor], wire_format: str | None = None, summed: Sequence[Tensor] = ()
    ) -> list[Tensor]:
        """Means of ``tensors`` and sums of ``summed`` over the replicas, in one all-reduce of one flat buffer."""
        everything = [*tensors, *summed]
        if not everything:
            return []
        flat = wire.pack(everything, wire.wire_dtype(wire_format or self.wire_format, everything))
        # Divided first: the sum cannot overflow, and equal numbers on 2, 3 or 4 replicas keep their exact value.
        flat[: sum(tensor.numel() for tensor in tensors)].div_(self.world_size)
        self.bytes_sent += flat.nbytes
        with record_function("curvadion::exchange"):
            dist.all_reduce(flat, group=self._group)
        return wire.unpack(flat, everything)


def _trainable(optimizer: CurvaDion) -> list[Tensor]:
    return [parameter for _, parameter in optimizer.named_parameters() if parameter.requires_grad]


def _state_tensors(optimizer: CurvaDion) -> tuple[list[Tensor], list[Tensor]]:
    """Floating-point state of all parameters, and one integer tensor with their step counts."""
    floating: list[Tensor] = []
    steps: list[int] = []
    device = torch.device("cpu")
    for _, parameter in optimizer.named_parameters():
        device = parameter.device
        state = optimizer.state[parameter]
        floating += [state[name] for name in sorted(state) if isinstance(state[name], Tensor)]
        steps += [state["step"]] if "step" in state else []
    return floating, [torch.tensor(steps, dtype=torch.int64, device=device)] if steps else []


def _write_back_steps(optimizer: CurvaDion, integers: Sequence[Tensor]) -> None:
    counted = [state for _, p in optimizer.named_parameters() if "step" in (state := optimizer.state[p])]
    for state, step in zip(counted, integers[0].tolist() if integers else (), strict=False):
        state["step"] = step


def _first_difference(descriptions: Sequence[list[str]]) -> str:
    reference = descriptions[0]
    for rank, other in enumerate(descriptions):
        for ours, theirs in zip(reference, other, strict=False):
            if ours != theirs:
                return f"replicas differ: rank 0 has [{ours}] where rank {rank} has [{theirs}]; {_REMEDY}"
        if len(other) != len(reference):
            return f"replicas differ: rank 0 has {len(reference)} entries and rank {rank} has {len(other)}; {_REMEDY}"
    raise AssertionError("digests differ but descriptions do not")


_REMEDY = "build the same model and the same optimizer, in the same order, in every process"
