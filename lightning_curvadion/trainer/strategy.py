"""CurvaDionStrategy: replicas that train alone, as a strategy of Lightning's Trainer."""

import inspect
import logging
from datetime import timedelta
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import record_function
from typing_extensions import override

from ..optim.gradient_checks import UnusableGradientError
from ..sync.errors import ReplicaLostError
from ..sync.failure_reports import report_failure, withdraw_report
from ..sync.process_group_sync import ProcessGroupSync
from ..sync.quantization import WireFormatName
from ..sync.settings import CHUNK, Consensus, Momentum, ResidualDtype
from .configuration_checks import refuse_arguments, refuse_sparse_embeddings, require_curvadion
from .consensus_callback import ConsensusCallback, moving_averages
from .lightning_internals import StrategyRegistryType, trainer_of
from .mixed_precision import refuse_gradient_scaler, share_gradient_scaler
from .paced_strategy import PacedStrategy
from .replica_processes import DDP_ARGUMENTS, ReplicaSize
from .signals import LeaveRequests, StopRequests

log = logging.getLogger(__name__)


class CurvaDionStrategy(PacedStrategy):
    """Data-parallel training without gradient all-reduces: replicas step alone until their optimizer's trigger fires.

    Launching, devices, samplers and checkpoints are those of Lightning's ``DDPStrategy``. The module is not wrapped in
    ``DistributedDataParallel`` where a replica is one process: there is no reducer and there are no gradient buckets.
    With ``replica_size`` it is, inside of each replica. What communicates between replicas is a
    :class:`~lightning_curvadion.ProcessGroupSync` hook on every :class:`~lightning_curvadion.CurvaDion` optimizer.
    Before validation, before a checkpoint is written (there with the optimizers' state) and at the end of fit, the
    replicas reach consensus whatever the triggers say, so that what is validated, saved and returned is one model.

    Names: ``Trainer(strategy="curvadion")``, ``"curvadion_spawn"``, ``"curvadion_fork"``, ``"curvadion_notebook"``, and
    ``"curvadion_node"`` with ``replica_size="node"``.
    They are known once ``lightning_curvadion`` is imported, as it is where ``configure_optimizers`` returns its
    optimizer. Lightning looks a name up before it loads any entry point, so installing could not make it known.

    Args:
        consensus: See :class:`~lightning_curvadion.ProcessGroupSync`, as for the next twelve.
        wire_format: Format of the parameters on the wire, from ``"float32"`` down to ``"int2"`` and ``"sign"``.
        vector_format: Format of the parameters of AdamW and Lion groups, such as embeddings.
        momentum: What a sync step does to the momentum.
        outer_lr: Learning rate of the outer step.
        outer_momentum: Momentum of the outer step.
        factor_format: Format of the momentum on the wire.
        sync_rank_fraction: Rank of the momentum's factors on the wire, to make it lower than the optimizer's.
        residual_dtype: Of the error-feedback residuals; ``"bfloat16"`` halves their memory.
        spread: How many sync steps send every parameter once.
        chunk: Numbers that are quantized and sent at a time; fewer need less memory.
        lag: How many steps after it was sent an agreement is read, 0 or 1.
        overlap: How many steps the mean of a sync step may take while the replicas train on.
        heterogeneous: Whether replicas may take different numbers of steps, as on fast and slow machines
            (``paced_loop.py``). They meet at the ends of epochs.
        replica_size: Number of consecutive processes that form a replica; ``"node"`` for those of a node. Inside of it
            gradients are averaged at every step, as under ``"ddp"``, and its processes hold the same bits. So a node
            sends what one process would, and fewer replicas lose less against DDP (``sync/two_levels.py``). Where
            ``configure_model`` calls ``fully_shard(..., mesh=self.device_mesh["data_parallel"])``, its processes share
            one model instead, and a checkpoint is a directory (``sharded_checkpoints.py``).
        elastic: Whether replicas may be lost, and come, while the others train on (``elastic.py``). They meet at the
            store at ``MASTER_ADDR`` and ``MASTER_PORT``; without these, replicas of this machine alone. SIGTERM lets a
            replica leave. Gloo only, and replicas of one process.
        min_replicas: With ``elastic``, fewer wait for others: 20 times ``timeout``, which is 30 seconds by default.
        accelerator: As in ``DDPStrategy``, like all that follow.
        parallel_devices: Devices of this node.
        cluster_environment: What launches the processes.
        checkpoint_io: What writes checkpoints.
        precision_plugin: Numerical precision.
        process_group_backend: Backend of ``torch.distributed``; by default NCCL on GPUs and gloo on CPUs.
        timeout: How long a collective waits for a rank that does not arrive. ``None`` is the backend's own default, 10
            minutes with NCCL and 30 with gloo. The replicas agree at every step, so a rank waits no longer than the
            slowest batch, validation or checkpoint of another takes.
        start_method: How processes are started.
        **ddp_arguments: Of ``DistributedDataParallel`` inside of a replica, such as ``find_unused_parameters``. Refused
            where a replica is one process, as unknown ones are, with the nearest name.

    The defaults are those of :class:`~lightning_curvadion.ProcessGroupSync`, chosen by
    ``examples/benchmarks/compare.py``; ``examples/benchmarks/README.md`` has its tables.

    Failures: a collective that a lost or stalled rank breaks raises an error that says what to do; with NCCL the
    process may end without it, see "Failures with NCCL" in ``examples/guide.md``. SIGTERM on any rank
    stops all of them after the same step, and ``on_exception`` callbacks save the consensus. So they do after a
    gradient that is not finite, which all ranks raise. After any other exception a rank saves its own replica, and
    starts no collective that the others would not join.

    Raises:
        MisconfigurationException: On a bad argument, on a number of processes that ``replica_size`` does not divide, on
            optimizers other than CurvaDion, on a module that differs between ranks or is sharded otherwise than over
            the processes of a replica, and on sparse embeddings.

    Example:
        >>> strategy = CurvaDionStrategy(wire_format="bfloat16")
        >>> trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=2, logger=False)
        >>> trainer.world_size
        2
    """

    def __init__(
        self,
        consensus: Consensus = "average",
        wire_format: WireFormatName | str | None = None,
        vector_format: WireFormatName | str | None = None,
        momentum: Momentum | None = None,
        outer_lr: float = 1.0,
        outer_momentum: float = 0.0,
        factor_format: WireFormatName | str | None = None,
        sync_rank_fraction: float | None = None,
        residual_dtype: ResidualDtype = "float32",
        spread: int = 1,
        chunk: int = CHUNK,
        lag: int = 1,
        overlap: int | None = None,
        heterogeneous: bool = False,
        replica_size: ReplicaSize = 1,
        elastic: bool = False,
        min_replicas: int | None = None,
        accelerator: "pl.accelerators.Accelerator | None" = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        **ddp_arguments: Any,
    ) -> None:
        # Named one by one above: a command line that reads signatures must not offer DistributedDataParallel's.
        accepted = DDP_ARGUMENTS if replica_size != 1 else set()
        refused = [name for name in ddp_arguments if name not in accepted]
        refuse_arguments(refused, {*inspect.signature(CurvaDionStrategy).parameters, *accepted})
        super().__init__(
            heterogeneous,
            elastic=elastic,
            min_replicas=min_replicas,
            replica_size=replica_size,
            ddp_arguments=ddp_arguments,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        self._sync_settings: dict[str, Any] = {
            "consensus": consensus,
            "wire_format": wire_format,
            "vector_format": vector_format,
            "momentum": momentum,
            "outer_lr": outer_lr,
            "outer_momentum": outer_momentum,
            "factor_format": factor_format,
            "sync_rank_fraction": sync_rank_fraction,
            "residual_dtype": residual_dtype,
            "spread": spread,
            "chunk": chunk,
            "lag": lag,
            "overlap": overlap,
            "heterogeneous": heterogeneous,
        }
        self.sync = self.make_sync_hook()
        self._callbacks: list[pl.Callback] = []
        self._stop_requests: StopRequests | None = None
        self._training = False
        self._all_raised = False

    def make_sync_hook(self) -> ProcessGroupSync:
        """A new hook with the strategy's settings.

        Raises:
            MisconfigurationException: On a bad setting.
        """
        try:
            return ProcessGroupSync(**self._sync_settings, group=self._group, inner_group=self._inner_group)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error

    # -- replicas that come and go -----------------------------------------------------------------------------------

    def _leave(self, leaves: bool) -> None:
        """After a step in which replicas have agreed that some leave: what these have learned stays."""
        assert self._elastic is not None
        self.reach_consensus(include_state=True)
        if leaves:
            self._elastic.leave()

    @override
    def setup_optimizers(self, trainer: "pl.Trainer") -> None:
        super().setup_optimizers(trainer)
        optimizers = require_curvadion(self.optimizers)
        assert self.lightning_module is not None
        refuse_sparse_embeddings(self.lightning_module)
        if self._elastic is not None:
            refuse_gradient_scaler(self.precision_plugin)
        share_gradient_scaler(self.precision_plugin, self.root_device)
        log.debug(f"{self.__class__.__name__}: attaching the sync hook to {len(optimizers)} optimizer(s)")
        # A second fit has new optimizers, which the first one's consensus does not concern.
        self.sync = self.make_sync_hook()
        try:
            for optimizer in optimizers:
                optimizer.register_sync_hook(self.sync)
            trained = self.lightning_module if self._inner_group is None or self._sharded else self.model
            assert trained is not None
            self.sync.include_module(trained)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        if self._elastic is None:
            self._stop_requests = StopRequests(trainer, self.sync)
        else:
            self._elastic.attach(trainer, self.sync)
            self._share_metrics(self.lightning_module)
            self._stop_requests = LeaveRequests(trainer, self.sync, self._elastic.interrupt, self._leave)
        self._begin_paces(trainer, self.sync)
        self._callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, ConsensusCallback) for callback in self._callbacks):
            callback = ConsensusCallback(
                self.reach_consensus_in_training,
                self._end_batch,
                self._verify_no_step,
                self._note_failure,
                self._begin_epoch,
                self._begin_batch,
                self._begin_validation_batch,
            )
            self._callbacks.insert(0, callback)

    # -- consensus ---------------------------------------------------------------------------------------------------

    def reach_consensus(self, include_state: bool = False) -> None:
        """Make all replicas one model now; every rank must call it.

        Moving averages of the weights that callbacks keep are averaged too.

        Args:
            include_state: Also average the optimizers' state.
        """
        log.debug(f"{self.__class__.__name__}: reaching consensus, include_state={include_state}")

        def reach() -> None:
            self.sync.reach_consensus(require_curvadion(self.optimizers), include_state=include_state)
            if averages := moving_averages(self._callbacks):
                self.sync.average(averages)

        with record_function("curvadion::consensus"):
            self._jointly(reach)

    def _end_batch(self) -> None:
        assert self._stop_requests is not None
        self._end_paced_batch(self.sync)
        self._stop_requests.act_on_agreed_request()

    def reach_consensus_in_training(self, include_state: bool = False) -> None:
        """Reach consensus while the replicas train; otherwise do nothing, as after an exception on this rank alone."""
        if self._training and not self._alone:
            self._verify_no_step()
            self.reach_consensus(include_state)

    def _note_failure(self, exception: BaseException) -> None:
        """Called before any other callback handles an exception, such as by saving."""
        self._all_raised = isinstance(exception, UnusableGradientError)
        self._meet()
        if self._all_raised:
            for optimizer in require_curvadion(self.optimizers):
                # Of the steps that the lag has left unread. The error that is raised tells enough.
                self.sync.agreement.take_unusable(optimizer)
        elif self._alone:
            self.sync.agreement.abandon()

    def _verify_no_step(self) -> None:
        """Verify that the other ranks have not gone on to their next step, whose agreement nothing else would match."""
        if self._training and not self._alone:
            self._jointly(lambda: self.sync.agreement.verify_no_step(self.root_device))

    @override
    def on_train_start(self) -> None:
        # By now Lightning has registered its own signal handlers.
        assert self._stop_requests is not None
        self._stop_requests.install()
        withdraw_report()
        self._training, self._all_raised = True, False
        self._begin_training()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state, in consensus: a checkpoint asks for it first, on every rank."""
        self.reach_consensus_in_training()
        return super().lightning_module_state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """An optimizer's state, in consensus: a checkpoint of more than weights asks for it, on every rank."""
        self.reach_consensus_in_training(include_state=True)
        return super().optimizer_state(optimizer)

    @override
    def on_train_end(self) -> None:
        self._training = False
        if self._elastic is not None:
            self._elastic.end_training()

    @override
    def on_exception(self, exception: BaseException) -> None:
        self._training = False
        if not isinstance(exception, ReplicaLostError):
            report_failure(exception)

    @override
    def teardown(self) -> None:
        self._training = False
        super().teardown()

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any = None) -> None:
        """As in ``DDPStrategy``; of a sharded module a directory, to which every process writes.

        Raises:
            MisconfigurationException: A sharded module is to be saved elsewhere than in a folder.
        """
        if self._sharded and self._alone:
            log.warning(
                f"{filepath} is not written: after an exception of one process its shards are no whole model. Restart"
                " from the newest checkpoint"
            )
        else:
            write = super().save_checkpoint
            # Where the rank that writes is lost, another one does.
            self._jointly(lambda: write(checkpoint, filepath, storage_options))

    @property
    @override
    def _alone(self) -> bool:
        """Whether this rank handles an exception that the others may not have: nobody would join a collective."""
        trainer = trainer_of(self.lightning_module)
        interrupted = trainer is not None and trainer.state.status == TrainerStatus.INTERRUPTED
        stopping = self._stop_requests is not None and self._stop_requests.stopping
        return super()._alone or (interrupted and not stopping and not self._all_raised)

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: StrategyRegistryType) -> None:
        entries: tuple[tuple[str, str, ReplicaSize], ...] = (
            ("curvadion", "popen", 1),
            ("curvadion_spawn", "spawn", 1),
            ("curvadion_fork", "fork", 1),
            ("curvadion_notebook", "fork", 1),
            ("curvadion_node", "popen", "node"),
        )
        for name, start_method, replica_size in entries:
            strategy_registry.register(
                name,
                cls,
                description=f"CurvaDion strategy, {start_method}" + "; replicas are nodes" * (replica_size == "node"),
                override=True,
                start_method=start_method,
                replica_size=replica_size,
            )
