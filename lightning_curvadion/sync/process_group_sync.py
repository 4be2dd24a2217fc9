"""ProcessGroupSync: the sync hook that lets the replicas of a process group synchronise.

What a step asks of it is in ``step_hook.py``, what a consensus outside of a step sends in ``consensus.py``. This class
is what users see of both.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..optim.curvadion import CurvaDion
from .drift import DriftMeter
from .errors import ReplicaLostError
from .failure_reports import report_uncaught_exceptions
from .grouped_hook import GroupedHook
from .load_notice import notify_of_loads
from .replica_checks import (
    check_data_parallel,
    describe_module,
    verify_same_across_replicas,
)
from .settings import CHUNK
from .sharding_checks import holds_shards


class ProcessGroupSync(GroupedHook):
    """Synchronises the replicas of a process group: a sync hook for :class:`~lightning_curvadion.CurvaDion`.

    Works in a plain torch loop, under Fabric, and inside :class:`~lightning_curvadion.CurvaDionStrategy`. One object
    may serve several optimizers of one model. A single replica trains bit for bit as without a hook.

    Args:
        group: Process group; ``None`` is the default group, which must be initialised when the hook is attached.
        consensus: How a sync step reconciles the parameters. ``"average"``: they become the mean over the replicas,
            bit-identical on all of them. ``"factors"``: the displacement of each matrix since the last consensus goes
            through factors of the optimizer's rank; cheap and inexact. ``"none"``: not at all, the paper's literal
            method; AdamW and Lion groups then step with the mean gradient.
        wire_format: Format of the parameters on the wire. ``"float32"`` sends them. ``"bfloat16"``, ``"int8"``,
            ``"int4"``, ``"int2"`` and ``"sign"`` (16, 8.1, 4.3, 2.3 and 1.1 bits a number) send their quantized
            displacement since the last consensus. The quantization error is stored in ``state[p]["residual"]`` and
            sent later (error feedback). So is that of a format of your own, by the name that
            :func:`~lightning_curvadion.register_wire_format` gave it. ``None`` is ``"sign"`` with the consensus
            ``"average"``, the fewest bytes for the loss in ``examples/benchmarks/README.md``. It is ``"float32"`` with
            the others and for parameters in float64.
        vector_format: Format of the parameters of AdamW and Lion groups, such as embeddings. ``None`` is
            ``wire_format``. If that has fewer bits, norms, biases and others of one dimension travel in ``"int8"``, and
            all of them do where an optimizer has at most 16,384 numbers in such groups. Quantized, only those rows of a
            matrix of 1024 rows or more travel that have moved (``sync/sparse_rows.py``).
        momentum: What a sync step does to the momentum. ``"displacement"``: each replica takes a local step, and its
            momentum then takes over what the mean displacement says of the others' (``optim/momentum_correction.py``);
            nothing is sent for it. ``"factors"``: all replicas step along the factors of the mean
            momentum, and the part of each replica's momentum in their span becomes the mean's. ``"dion"``: the same
            factors, and each replica keeps its own momentum. ``"average"``: momentum and Q are averaged. ``"local"``:
            nothing; each replica takes a local step (local SGD). ``None`` is ``"displacement"`` with the consensus
            ``"average"``, the lowest loss for its bytes in ``examples/benchmarks/README.md``. It is ``"factors"`` with
            ``"factors"``. Consensus ``"none"`` implies ``"dion"``.
        outer_lr: Learning rate of the outer step on the averaged displacement; 1 takes the average itself.
        outer_momentum: Nesterov momentum of the outer step, as in DiLoCo.
        factor_format: Format of the momentum on the wire, its factors or the whole of it. Also of the factors of
            displacements (consensus ``"factors"``) and of averaged gradients (consensus ``"none"``). ``None`` is
            ``wire_format`` at 16 bits and more, and ``"int4"`` below.
        sync_rank_fraction: Rank of the factors that a sync step sends over the smaller side of the matrix, to make it
            lower than the optimizer's. Every replica then takes a local step of full rank, and afterwards the momenta
            are averaged in the span of the leading columns. For ``momentum="factors"``.
        residual_dtype: ``"float32"``, or ``"bfloat16"`` for half the memory; what it rounds away is lost.
        spread: How many sync steps send every parameter once. 1 sends all at each; n sends an n-th at each, balanced
            by size. So that every parameter travels as often, let the trigger fire n times as often. The replicas are
            equal after a consensus outside of a step only. For ``consensus="average"`` with a
            ``momentum`` that sends nothing.
        chunk: Numbers that are quantized, sent and dequantized at a time. Larger payloads take more collectives.
        lag: How many steps after it was sent an agreement is read. With 1 or more a local step waits for nobody whose
            numbers arrive in that time: the trigger sees the RMMC of so many steps before. An unusable gradient is an
            error as much later.
        overlap: How many steps the mean of a sync step may take. With 0 the sync step waits for it. Otherwise the
            replicas train on, and take the mean over so many steps later, whenever it arrived:
            :math:`x \\leftarrow x + (\text{new anchor} - \text{what was sent from})`. So they are equal after a
            consensus outside of a step only. A sync that comes due meanwhile begins when the mean is taken over. For
            ``consensus="average"`` with a ``momentum`` that sends nothing. ``None`` is 0.
        inner_group: The processes that form this replica, where it has several. They train a module in
            ``DistributedDataParallel(module, process_group=inner_group)``, or one that ``fully_shard`` has sharded over
            them, for ``consensus="average"`` with a ``momentum`` that sends nothing. ``group`` then holds process i of
            every replica, for this process the i-th of its own (``sync/two_levels.py``,
            ``sync/sharded_replicas.py``). With a ``DeviceMesh``:
            ``group=mesh.get_group("replica"), inner_group=mesh.get_group("inner")``.
        heterogeneous: Let fast replicas take more steps than slow ones (``sync/paced_agreement.py``). Means are
            weighted by the steps of each. The slowest replica starts an agreement at each of its steps. Triggers,
            ``max_local_steps`` and ``overlap`` count these and not steps. ``overlap`` is 1 by default. With less, a
            fast replica waits for a slow one's step at every sync; more than two replicas, or buffers, take more.
            :attr:`global_step` says when all replicas end, or reach a consensus. For one optimizer and
            ``consensus="average"`` with a ``momentum`` that sends nothing.

    Memory: a copy of the parameters in float32 where ``momentum="displacement"``, ``consensus="factors"``, a quantized
    ``wire_format``, an outer step, ``heterogeneous`` or the trigger :class:`~lightning_curvadion.DriftThreshold` needs
    it; another one of ``residual_dtype`` for a quantized ``wire_format``; another one for ``outer_momentum``; another
    one while a mean is under way with ``overlap``. During a sync step the factors and about ``5 * chunk`` numbers,
    less for a smaller model; with ``momentum="displacement"`` also the square of each matrix's smaller side. With an
    ``inner_group`` a process stores the residuals of what it sends, and no others; of sharded parameters it stores all
    of this for its shards alone.

    Attributes:
        settings: The checked arguments.
        agreement: The all-reduce of every step. ``agreement.stop_request`` asks all replicas for something with it, and
            ``agreement.agreed_request`` is what they agreed on.

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
        (True, 16)
        >>> sync.reach_consensus(optimizer, include_state=True)  # before a checkpoint
        >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        group: ProcessGroup | None = None,
        consensus: str = "average",
        wire_format: str | None = None,
        vector_format: str | None = None,
        momentum: str | None = None,
        outer_lr: float = 1.0,
        outer_momentum: float = 0.0,
        factor_format: str | None = None,
        sync_rank_fraction: float | None = None,
        residual_dtype: str = "float32",
        spread: int = 1,
        chunk: int = CHUNK,
        lag: int = 1,
        overlap: int | None = None,
        inner_group: ProcessGroup | None = None,
        heterogeneous: bool = False,
    ) -> None:
        if heterogeneous and inner_group is not None:
            raise ValueError("heterogeneous=True needs replicas of one process each: leave out inner_group")
        arguments: dict[str, Any] = {
            "consensus": consensus,
            "wire_format": wire_format,
            "vector_format": vector_format,
            "momentum": momentum,
            "outer_lr": outer_lr,
            "outer_momentum": outer_momentum,
            "factor_format": factor_format,
            "sync_rank_fraction": sync_rank_fraction,
            "residual_dtype": str(residual_dtype).removeprefix("torch."),
            "spread": spread,
            "chunk": chunk,
            "lag": lag,
            "overlap": overlap,
            "heterogeneous": heterogeneous,
        }
        super().__init__(arguments, group, inner_group)

    @property
    def optimizers(self) -> list[CurvaDion]:
        """The optimizers that it is attached to."""
        return list(self._optimizers)

    @property
    def anchor_bytes(self) -> int:
        """Memory of the last consensus, in bytes; 0 where the settings need none."""
        return self._parameters.anchors.nbytes

    def measure_drift(self) -> None:
        """Measure :attr:`drift` from now on: one more pass over the parameters at a sync step, and nothing sent."""
        self._parameters.meter = DriftMeter()

    @property
    def drift(self) -> float | None:
        """Distance of this replica to the last consensus just before it was reached, relative to its norm.

        ``None`` where neither the last step nor anything since has reached one. It covers the parameters that were
        averaged: with the consensus ``"none"`` and ``"factors"`` a sync step averages none or some of them,
        :meth:`reach_consensus` all. Where they are sharded it is that of this process's shards. Reading it waits for
        the device.
        """
        meter = self._parameters.meter
        return meter.drift if meter is not None else None

    # -- attaching --------------------------------------------------------------------------------------------------

    def _attach(self, optimizer: CurvaDion) -> None:
        """Verify that all replicas train the same model with the same settings, then broadcast rank 0's values.

        Called by :meth:`CurvaDion.register_sync_hook <lightning_curvadion.CurvaDion.register_sync_hook>`.

        Raises:
            ValueError: No process group, a backend or a parameter that does not fit the wire formats, or replicas that
                differ: on every rank, naming the first difference. Also a trigger that watches the drift, where the
                consensus ``"none"`` never ends it.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "ProcessGroupSync needs a process group: call torch.distributed.init_process_group first,"
                " start the script with torchrun, or use Trainer(strategy='curvadion')"
            )
        if self._pace is not None and self._optimizers:
            raise ValueError("heterogeneous=True serves one optimizer: an agreement counts its steps; make one of them")
        report_uncaught_exceptions(other_than=ReplicaLostError)
        self._join(optimizer)
        optimizer.register_step_pre_hook(lambda stepping, *_: self._before_step(cast(CurvaDion, stepping)))
        optimizer.register_load_state_dict_post_hook(lambda loaded: self._unsettle(cast(CurvaDion, loaded)))

    def include_module(self, module: nn.Module) -> None:
        """Let what no optimizer trains take part in every consensus: persistent buffers, and parameters outside every
        optimizer, such as those of an EMA teacher or of a target network.

        They become their mean; integers become rank 0's. Only what differs between the replicas is sent. Sync steps in
        a wire format below 16 bits leave such parameters to the consensus outside of steps. Call it on every rank,
        after the hooks are attached; it sets parameters outside and buffers to rank 0's values.

        Raises:
            ValueError: The module is or holds a ``DistributedDataParallel``, or differs between replicas. With an
                ``inner_group``: it is none, or one of another group.
        """
        check_data_parallel(module, self._inner_group, sharded=any(map(holds_shards, self._optimizers)))
        self._untrained.include(module)
        # Before the broadcast: a rank with nothing to send would not join the ranks that have something.
        verify_same_across_replicas(self._collectives, describe_module(module), next(module.parameters()).device)
        self.take_from_rank_0({**self._untrained.parameters_outside(), **dict(module.named_buffers())})
        notify_of_loads(module, self.note_other_values)

    def note_other_values(self, parameters: Iterable[Tensor]) -> None:
        """Note that parameters were set to something else than their last step left in them, as by a rollback.

        Before the next step changes them they are compared, and averaged at full width where they differ. The
        ``load_state_dict`` of an included module calls it, and loading an optimizer's state does as much; after other
        writes, call it yourself. It communicates nothing, and one rank may call it alone.
        """
        other = set(parameters)
        for optimizer in self._optimizers:
            members = [parameter for _, parameter in optimizer.named_parameters() if parameter in other]
            self._parameters.forget(optimizer, members)
            if any(parameter.requires_grad for parameter in members):
                self._unsettle(optimizer)

    def _unsettle(self, optimizer: CurvaDion) -> None:
        self._consensus.unsettle(optimizer)
        self._overlap.discard(optimizer)

    # -- consensus outside of a step --------------------------------------------------------------------------------

    # A Trainer validates in inference mode, whose tensors no step could update.
    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def reach_consensus(self, optimizers: CurvaDion | Iterable[CurvaDion], include_state: bool = False) -> None:
        """Make all replicas one model now, whatever the trigger and the kind of consensus: an exact average.

        The error-feedback residuals are flushed into it. It is permanent, with ``consensus="factors"`` and ``"none"``
        too: the replicas continue from the average. What is in consensus since the last step is not sent again.

        Args:
            optimizers: The attached optimizers, the same in every process.
            include_state: Also average their state, and frozen parameters, so that any replica can write the
                checkpoint of all.

        Raises:
            ValueError: With a lag, where a gradient of the last step was unusable on any replica.
            UnevenBatchesError: With ``heterogeneous=True``, where another replica takes a step.
        """
        optimizers = [optimizers] if isinstance(optimizers, CurvaDion) else list(optimizers)
        for optimizer in optimizers:
            self.agreement.prepare_consensus(optimizer)
            self._overlap.finish(optimizer)
            optimizer._raise_if_unusable(self.agreement.take_unusable(optimizer))
        self._consensus.reach(optimizers, include_state)

    def average(self, tensors: dict[str, Tensor]) -> None:
        """Replace tensors that no optimizer holds by their means where they differ, such as moving averages.

        Args:
            tensors: By name, the same on every rank; integer tensors become rank 0's.
        """
        self._consensus.average(tensors)
