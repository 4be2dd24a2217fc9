"""ProcessGroupSync: what the replicas tell each other, and when.

A local step makes one all-reduce of 16 bytes. A sync step makes at most two exchanges more, of everything at once, so
that a model of any depth costs as many collectives as one matrix; an exchange is one collective at full width and
between two replicas, two where coded numbers of more replicas meet (``exchange.py``).

===================  =============================  ================================
momentum             first exchange                 second
===================  =============================  ================================
``"factors"``        P, or B where smaller          R
``"dion"``           P, or B where smaller          R
``"average"``        B and Q
``"local"``
===================  =============================  ================================

consensus            first exchange                 second
===================  =============================  ================================
``"average"``                                       all parameters, buffers
``"factors"``        left displacement factor       right displacement factor, parameters without factors, buffers
``"none"``                                          vector gradients
===================  =============================  ================================

Where a step along common factors follows (momentum ``"factors"`` and ``"dion"``), parameters meet just before it, which
comes to the same and saves an exchange.
"""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..optim import dion
from ..optim.curvadion import CurvaDion
from .anchors import Anchors, OuterStep
from .collectives import Exchange
from .drift import DriftMeter
from .payloads import Averaged, Displacement, Factor, Integers, Parcel
from .replica_checks import check_equal, check_formats, describe_module, describe_optimizer
from .settings import CHUNK, SyncSettings
from .shared_state import state_tensors, trainable, write_back_steps

# Chosen by loss, see examples/benchmarks/README.md.
FACTOR_FORMAT_BESIDE = {"float32": "float32", "bfloat16": "bfloat16"}
FACTOR_FORMAT = "int4"


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
        wire_format: How parameters travel: ``"float32"``, or coded in ``"bfloat16"``, ``"int8"``, ``"int4"``,
            ``"int2"`` or ``"sign"`` (16, 8.1, 4.3, 2.3 and 1.1 bits a number) as displacements since the last
            consensus. What coding loses of a displacement is kept in ``state[p]["residual"]`` and sent another time.
        momentum: What a sync step does to momentum. ``"factors"``: step along the factors of the mean momentum, and the
            part of each replica's momentum in their span becomes the mean's. ``"dion"``: the same factors, and each
            replica keeps its own momentum. ``"average"``: the whole momentum is averaged, and Q with it. ``"local"``:
            nothing, each replica takes its own Dion step (local SGD). Consensus ``"none"`` implies ``"dion"``.
        outer_lr: Learning rate of the outer step on the averaged displacement; 1 takes the average itself.
        outer_momentum: Nesterov momentum of the outer step, as in DiLoCo.
        factor_format: How momentum travels, its factors or the whole of it, and the factors of displacements and the
            vector gradients of the other kinds of consensus. ``None`` is ``wire_format`` at 16 bits and more and
            ``"int4"`` below.
        sync_rank_fraction: Rank of the factors that a sync step sends over the smaller side of the matrix, where it is
            to be lower than the optimizer's. Every replica takes a local step of full rank then, and the momenta meet
            after it in the span of the leading columns. For ``momentum="factors"``.
        residual_dtype: ``"float32"``, or ``"bfloat16"`` for half the memory, with what that rounds away lost.
        chunk: Numbers that are coded, sent and decoded at a time; larger payloads take more collectives.

    Memory: a copy of the parameters in float32 where ``consensus="factors"``, a coded ``wire_format`` or an outer step
    needs it, another one of ``residual_dtype`` for a coded ``wire_format``, and another one for ``outer_momentum``.
    During a sync step about ``5 * chunk`` numbers, less where the model is smaller, and the factors.

    Attributes:
        wish: A number between 0 and 1 for all replicas to hear, such as that one of them has to stop. Signal handlers
            may set it: it travels with the 16 bytes of the next step.
        heard: The largest wish of any replica in the last step, 0 for none; the same on all of them.

    Raises:
        ValueError: On a bad argument, or a combination that would do nothing.

    Example:
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> model = nn.Linear(8, 8, bias=False)
        >>> optimizer, sync = CurvaDion(model.parameters()), ProcessGroupSync()
        >>> optimizer.register_sync_hook(sync)
        >>> sync.include_module(model)
        >>> optimizer.step(lambda: model(torch.ones(1, 8)).sum().backward())
        >>> optimizer.last_step.synced, optimizer.last_step.bytes_sent
        (True, 528)
        >>> sync.reach_consensus(optimizer, include_state=True)  # before a checkpoint
        >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        group: ProcessGroup | None = None,
        consensus: str = "average",
        wire_format: str = "float32",
        momentum: str = "factors",
        outer_lr: float = 1.0,
        outer_momentum: float = 0.0,
        factor_format: str | None = None,
        sync_rank_fraction: float | None = None,
        residual_dtype: str = "float32",
        chunk: int = CHUNK,
    ) -> None:
        self.settings = SyncSettings(
            consensus=consensus,
            wire_format=wire_format,
            momentum=momentum,
            outer_lr=outer_lr,
            outer_momentum=outer_momentum,
            factor_format=factor_format or FACTOR_FORMAT_BESIDE.get(wire_format, FACTOR_FORMAT),
            sync_rank_fraction=sync_rank_fraction,
            residual_dtype=str(residual_dtype).removeprefix("torch."),
            chunk=chunk,
        )
        self.momentum = "dion" if consensus == "none" else momentum
        self.sync_rank_fraction = sync_rank_fraction
        self.averages_vector_gradients = consensus == "none"
        self._exchange = Exchange(group, chunk)
        self._anchors = Anchors()
        self._known: set[Tensor] = set()
        # By name the module that holds the buffer, which may replace the tensor itself (SWA does).
        self._holders: dict[str, nn.Module] = {}
        # Optimizers that have met since their last step, and whether with their state: once is enough.
        self._met: dict[CurvaDion, bool] = {}
        self._buffers_moved = False
        # Left displacement factors on their way from the first exchange of a sync step to the second.
        self._displacement_P: list[Tensor] = []
        self._meter: DriftMeter | None = None
        self.wish = self.heard = 0.0

    @property
    def rank(self) -> int:
        """This replica."""
        return self._exchange.rank

    @property
    def world_size(self) -> int:
        """Number of replicas."""
        return self._exchange.world_size

    @property
    def bytes_sent(self) -> int:
        """Payload of this replica's collectives so far; a mean of n bytes, coded or not, counts n."""
        return self._exchange.bytes_sent

    def measure_drift(self) -> None:
        """From now on, measure :attr:`drift`: one more pass over the parameters at a sync step, and nothing sent."""
        self._meter = DriftMeter()

    @property
    def drift(self) -> float | None:
        """Distance of this replica to the consensus, relative to its norm, just before they met in the last step or
        since; ``None`` where they have not. Only what meets is seen: with the consensus ``"none"`` and ``"factors"``
        all parameters in :meth:`reach_consensus`, and none or the rest at a sync step. Reading it waits for the device.
        """
        return self._meter.drift if self._meter is not None else None

    # -- getting together -------------------------------------------------------------------------------------------

    def attach(self, optimizer: CurvaDion) -> None:
        """Check that all replicas train the same model alike, then broadcast rank 0's values.

        Called by :meth:`CurvaDion.register_sync_hook <lightning_curvadion.CurvaDion.register_sync_hook>`.

        Raises:
            ValueError: No process group, a backend or a parameter that the wire formats do not fit, or replicas that
                differ: on every rank, naming the first difference.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "ProcessGroupSync needs a process group: call torch.distributed.init_process_group first,"
                " start the script with torchrun, or use Trainer(strategy='curvadion')"
            )
        self._exchange.join()
        parameters = [parameter for _, parameter in optimizer.named_parameters()]
        for parameter in parameters:
            optimizer.state[parameter].pop("residual", None)
        device = parameters[0].device
        check_equal(self._exchange, [f"hook {self.settings}", *describe_optimizer(optimizer)], device)
        formats = {name: getattr(self.settings, name) for name in ("wire_format", "factor_format")}
        check_formats(self._exchange, optimizer, formats, device)
        floating, integers = state_tensors(optimizer)
        self._exchange.broadcast(parameters + list(floating.values()) + integers)
        write_back_steps(optimizer, integers)
        self._known.update(parameters)
        optimizer.register_step_pre_hook(lambda opt, *_: self._before_step(cast(CurvaDion, opt)))
        optimizer.register_load_state_dict_post_hook(lambda opt: self._forget(cast(CurvaDion, opt)))

    def _before_step(self, optimizer: CurvaDion) -> None:
        self._met.pop(optimizer, None)
        self.expect_other_buffers()
        if self._meter is not None:
            self._meter.start()
        if self.settings.needs_anchors:
            self._anchors.capture(trainable(optimizer).values())

    def _forget(self, optimizer: CurvaDion) -> None:
        """A state was loaded: the consensus is wherever the parameters are by the next step."""
        self._met.pop(optimizer, None)
        self._anchors.drop(parameter for _, parameter in optimizer.named_parameters())

    def expect_other_buffers(self) -> None:
        """Told that buffers may have changed since they met, as a forward pass without a step changes them."""
        self._buffers_moved = True

    def include_module(self, module: nn.Module) -> None:
        """Let the module's persistent buffers take part in every consensus: floating-point ones as means, others
        rank 0's.

        Also broadcasts rank 0's buffers and the parameters that no attached optimizer holds. Call it on every rank,
        after the hook is attached.
        """
        saved = module.state_dict(keep_vars=True)
        buffers = [name for name, _ in module.named_buffers() if name in saved]
        self._holders = {name: module.get_submodule(name.rpartition(".")[0]) for name in buffers}
        rest = [parameter for parameter in module.parameters() if parameter not in self._known]
        # Also where this rank has nothing to send: another one may, and would wait for it.
        check_equal(self._exchange, describe_module(module), next(module.parameters()).device)
        self._exchange.broadcast(rest + list(module.buffers()))

    def _buffers(self) -> dict[str, Tensor]:
        return {name: getattr(holder, name.rpartition(".")[2]) for name, holder in self._holders.items()}

    # -- one step ---------------------------------------------------------------------------------------------------

    def agree(self, signal: Tensor) -> tuple[float, float]:
        """The element-wise maximum over the replicas of ``signal``, two float64: all that a local step sends.

        A wish goes where the code of a fault goes; any fault is larger, and more urgent.
        """
        if self.wish:
            signal[1].clamp_(min=self.wish)
        self._exchange.maximum(signal)
        rmmc, fault = signal.tolist()
        self.heard = fault if fault < 1 else 0.0
        return rmmc, fault

    def mean_left(self, optimizer: CurvaDion, factors: Sequence[Tensor], whole: Sequence[Tensor]) -> list[Tensor]:
        """First exchange of a sync step; see :class:`~lightning_curvadion.optim.sync_hook.SyncHook`."""
        parcels = [self._factor("left factors of the momentum", factor) for factor in factors]
        sketches = []
        if self.settings.consensus == "factors":
            sketches = [
                # Local Dion steps are sums of P Q^T, so the momentum's Q is a good sketch of the displacement too.
                self._factor(
                    "left factors of the displacement", dion.left_factor(displacement, stack.Q.to(displacement.dtype))
                )
                for stack in optimizer.matrix_stacks()
                for displacement in [self._anchors.stacked_displacement(stack)]
            ]
        self._exchange.average([*parcels, *self._whole(whole), *sketches])
        self._displacement_P = [dion.orthonormalize(sketch.mean) for sketch in sketches]
        return [parcel.mean for parcel in parcels]

    def mean_right(self, optimizer: CurvaDion, factors: Sequence[Tensor], whole: Sequence[Tensor]) -> list[Tensor]:
        """Second exchange of a sync step, parameters and buffers included."""
        parcels = [self._factor("right factors of the momentum", factor) for factor in factors]
        stacks = optimizer.matrix_stacks() if self.settings.consensus == "factors" else []
        own = [
            dion.right_factor(self._anchors.stacked_displacement(stack), P)
            for stack, P in zip(stacks, self._displacement_P, strict=True)
        ]
        moves = [self._factor("right factors of the displacement", R) for R in own]
        self._exchange.average([*parcels, *self._whole(whole), *moves, *self._meeting(optimizer)])
        for stack, P, own_R, move in zip(stacks, self._displacement_P, own, moves, strict=True):
            self._anchors.move_through_factors(stack, P, own_R, move.mean)
        self._displacement_P = []
        if self.settings.consensus == "average":
            self._met[optimizer] = False
        return [parcel.mean for parcel in parcels]

    def _factor(self, name: str, factor: Tensor) -> Factor:
        return Factor(f"{name}, {tuple(factor.shape)},", factor, self.settings.factor_format)

    def _whole(self, tensors: Sequence[Tensor]) -> list[Parcel]:
        return [Averaged(f"momentum {tuple(tensor.shape)}", tensor, self.settings.factor_format) for tensor in tensors]

    def _meeting(self, optimizer: CurvaDion) -> list[Parcel]:
        """Parameters and buffers, as the consensus of a sync step wants them."""
        if self.settings.consensus == "none":
            return []
        parameters = trainable(optimizer)
        if self.settings.consensus == "factors":
            factored = {parameter for stack in optimizer.matrix_stacks() for parameter in stack.parameters}
            parameters = {name: p for name, p in parameters.items() if p not in factored}
        self._buffers_moved = False
        return [*self._moves(optimizer, parameters, self.settings.wire_format), *self._exact(self._buffers())]

    def _moves(
        self,
        optimizer: CurvaDion,
        parameters: dict[str, Tensor],
        wire_format: str,
        settle: bool = False,
        outer: bool = True,
    ) -> list[Parcel]:
        """What brings parameters together: themselves, or their displacements.

        Args:
            optimizer: Keeper of the state.
            parameters: By name.
            wire_format: A coded one uses and keeps residuals.
            settle: With ``"float32"``, send the residuals too, and have none any more.
            outer: Whether an outer step is due.
        """
        if self._meter is not None and parameters:
            self._meter.start()
        if not self.settings.needs_anchors:
            return [Averaged(name, parameter, meter=self._meter) for name, parameter in parameters.items()]
        self._anchors.capture(parameters.values())
        parcels: list[Parcel] = []
        for name, parameter in parameters.items():
            state = optimizer.state[parameter]
            residual = state.pop("residual", None) if settle else None
            if wire_format != "float32":
                if "residual" not in state:
                    dtype = self.settings.dtype_of_residuals
                    state["residual"] = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
                residual = state["residual"]
            step = (
                OuterStep(state, parameter, self.settings.outer_lr, self.settings.outer_momentum)
                if outer and self.settings.steps_outside
                else None
            )
            anchor = self._anchors.of(parameter)
            parcels.append(Displacement(name, parameter, anchor, wire_format, residual, step, self._meter))
        return parcels

    def _exact(self, tensors: dict[str, Tensor]) -> list[Parcel]:
        """Means at full width; of integers rank 0's."""
        return [
            Averaged(name, tensor) if tensor.is_floating_point() else Integers(name, tensor, self.rank, self.world_size)
            for name, tensor in tensors.items()
        ]

    def average(self, tensors: dict[str, Tensor]) -> None:
        """Replace tensors that are none of the optimizers' by their means, such as a moving average of the weights.

        Args:
            tensors: By name, the same on every rank; of integers everybody gets rank 0's.
        """
        self._exchange.average(self._exact(tensors))

    # -- consensus whatever the trigger says ------------------------------------------------------------------------

    def reach_consensus(self, optimizers: CurvaDion | Iterable[CurvaDion], include_state: bool = False) -> None:
        """Make all replicas one model now, whatever the trigger and the kind of consensus: an average at full width.

        With ``consensus="factors"`` and ``"none"`` too, and for good: the replicas go on from the average. What has met
        already since the last step is not sent again.

        Args:
            optimizers: The attached optimizers, the same in every process.
            include_state: Also average their state, so that a checkpoint of any replica is the checkpoint of all, and
                settle what coding has kept back so far: the parameters get it whole. Frozen parameters take part then.
        """
        buffers = self._buffers() if self._buffers_moved else {}
        self._buffers_moved = False
        for optimizer in [optimizers] if isinstance(optimizers, CurvaDion) else optimizers:
            met_state = self._met.get(optimizer)
            if met_state or (met_state is False and not include_state):
                continue
            optimizer.init_state()
            moved = met_state is None
            trained = trainable(optimizer)
            due = dict(trained) if moved else {}
            others, buffers = buffers, {}
            steps: list[Tensor] = []
            if include_state:
                # Also of parameters frozen since.
                due.update((name, p) for name, p in optimizer.named_parameters() if "residual" in optimizer.state[p])
                frozen = {
                    name: p for name, p in optimizer.named_parameters() if not p.requires_grad and name not in due
                }
                state, steps = state_tensors(optimizer)
                others.update({**frozen, **state, **dict(zip(["step counts"], steps, strict=False))})
            parcels = self._moves(optimizer, due, "float32", settle=include_state, outer=moved) + self._exact(others)
            self._exchange.average(parcels)
            if include_state:
                write_back_steps(optimizer, steps)
                optimizer.replicas_share_state()
                # A run that resumes has no other anchor than the parameters.
                self._anchors.drop(trained.values())
            self._met[optimizer] = include_state
        if buffers:
            self._exchange.average(self._exact(buffers))
