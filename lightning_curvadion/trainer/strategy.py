"""CurvaDionStrategy: everything that knows about the Trainer."""

import atexit
import logging
from datetime import timedelta
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.strategy import TBroadcast
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.profiler import record_function
from typing_extensions import override

from ..optim.curvadion import CurvaDion
from ..sync.errors import explain_failure
from ..sync.process_group_sync import ProcessGroupSync
from ..sync.quantization import WireFormat
from ..sync.settings import CHUNK, Consensus, Momentum, ResidualDtype
from .checkpoint_io import AtomicCheckpointIO
from .consensus_callback import ConsensusCallback, moving_averages
from .signals import StopRequests

log = logging.getLogger(__name__)


class CurvaDionStrategy(DDPStrategy):
    """Data-parallel training without an all-reduce: replicas step alone until their optimizer asks for a sync.

    Launching, devices, samplers and checkpoints are those of Lightning's ``DDPStrategy``. The module is not wrapped in
    ``DistributedDataParallel``: there is no reducer and there are no gradient buckets. What communicates is a
    :class:`~lightning_curvadion.ProcessGroupSync` hook on every :class:`~lightning_curvadion.CurvaDion` optimizer.
    Before validation, before a checkpoint is written (there with the optimizers' state) and at the end of fit, the
    replicas reach consensus whatever the triggers say, so that what is validated, saved and returned is one model.

    Names: ``Trainer(strategy="curvadion")``, ``"curvadion_spawn"``, ``"curvadion_fork"``, ``"curvadion_notebook"``.

    Args:
        consensus: See :class:`~lightning_curvadion.ProcessGroupSync`, as for the next eight.
        wire_format: How parameters travel, from ``"float32"`` down to ``"int2"`` and ``"sign"``. ``None`` is
            ``"sign"`` with the consensus ``"average"``, the fewest bytes for the loss in the comparison, and
            ``"float32"`` (every number at full width) with the others and for parameters in float64.
        momentum: What a sync step does to momentum. ``None`` is ``"local"`` with the consensus ``"average"``, since
            bytes were better spent on syncs than on momentum, and ``"factors"`` with the others.
        outer_lr: Learning rate of the outer step.
        outer_momentum: Momentum of the outer step.
        factor_format: How momentum travels, in one of the formats of ``wire_format``. ``None`` is that one down to 16
            bits, and ``"int4"`` below.
        sync_rank_fraction: Rank of the factors that momentum meets through, where it is to be lower than the
            optimizer's.
        residual_dtype: Of what coding keeps back; ``"bfloat16"`` halves that memory.
        chunk: Numbers that are coded and sent at a time; fewer need less memory.
        accelerator: As in ``DDPStrategy``, like all that follow.
        parallel_devices: Devices of this node.
        cluster_environment: Who launches the processes.
        checkpoint_io: What writes checkpoints.
        precision_plugin: Numerical precision.
        process_group_backend: Backend of ``torch.distributed``; by default NCCL on GPUs and gloo on CPUs.
        timeout: How long a collective waits for a replica that does not come.
        start_method: How processes are started.
        **unsupported: Arguments of ``DistributedDataParallel`` are refused.

    The defaults were chosen by ``examples/benchmarks/compare.py``; ``examples/benchmarks/README.md`` has its tables.
    :class:`~lightning_curvadion.ProcessGroupSync` itself defaults to full width.

    Failures: a collective that a lost or stalled replica breaks raises an error that says so. SIGTERM on any replica
    stops all of them after the same step, with the consensus in what ``on_exception`` callbacks save; after any other
    exception a replica saves what it has, and starts no collective that nobody would join.

    Raises:
        MisconfigurationException: On a bad argument, on optimizers other than CurvaDion, on a module that differs
            between ranks, and on sparse embeddings.

    Example:
        >>> strategy = CurvaDionStrategy(wire_format="bfloat16")
        >>> trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=2, logger=False)
        >>> trainer.world_size
        2
    """

    def __init__(
        self,
        consensus: Consensus = "average",
        wire_format: WireFormat | None = None,
        momentum: Momentum | None = None,
        outer_lr: float = 1.0,
        outer_momentum: float = 0.0,
        factor_format: WireFormat | None = None,
        sync_rank_fraction: float | None = None,
        residual_dtype: ResidualDtype = "float32",
        chunk: int = CHUNK,
        accelerator: "pl.accelerators.Accelerator | None" = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        **unsupported: Any,
    ) -> None:
        # Not passed on, and so not offered by a command line that reads signatures.
        if "state_dict_type" in unsupported:
            raise MisconfigurationException(
                "state_dict_type: CurvaDionStrategy, like DDPStrategy, has no sharded checkpoints, since every replica"
                " holds the whole model; leave it out, and a checkpoint is one file of the consensus"
            )
        if unsupported:
            raise MisconfigurationException(
                f"{', '.join(unsupported)}: CurvaDionStrategy does not wrap the model in DistributedDataParallel, whose"
                " arguments and communication hooks have no meaning here; leave it out, or use strategy='ddp'"
            )
        super().__init__(
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
            "momentum": momentum or ("local" if consensus == "average" else "factors"),
            "outer_lr": outer_lr,
            "outer_momentum": outer_momentum,
            "factor_format": factor_format,
            "sync_rank_fraction": sync_rank_fraction,
            "residual_dtype": residual_dtype,
            "chunk": chunk,
        }
        self.sync = self._new_sync()
        self._callbacks: list[pl.Callback] = []
        self._signals: StopRequests | None = None
        self._training = False

    def _new_sync(self, codable: bool = True) -> ProcessGroupSync:
        sparing = codable and self._sync_settings["consensus"] == "average"
        wire_format = self._sync_settings["wire_format"] or ("sign" if sparing else "float32")
        try:
            return ProcessGroupSync(**{**self._sync_settings, "wire_format": wire_format})
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error

    @override
    def setup_distributed(self) -> None:
        super().setup_distributed()
        # Lightning does it for NCCL alone, and gloo's threads abort a process that ends with them now and then.
        atexit.unregister(_leave_process_group)
        atexit.register(_leave_process_group)

    @override
    def configure_ddp(self) -> None:
        """Nothing is wrapped: without a reducer, backward stays on its replica."""
        log.debug(f"{self.__class__.__name__}: leaving the module unwrapped")

    @override
    def setup_optimizers(self, trainer: "pl.Trainer") -> None:
        super().setup_optimizers(trainer)
        optimizers = self._curvadion_optimizers()
        assert self.lightning_module is not None
        _refuse_sparse_embeddings(self.lightning_module)
        self._share_overflows()
        log.debug(f"{self.__class__.__name__}: attaching the sync hook to {len(optimizers)} optimizer(s)")
        # A second fit has new optimizers, and nothing of the first one's consensus concerns them.
        self.sync = self._new_sync(
            codable=all(p.dtype != torch.float64 for optimizer in optimizers for _, p in optimizer.named_parameters())
        )
        try:
            for optimizer in optimizers:
                optimizer.register_sync_hook(self.sync)
            self.sync.include_module(self.lightning_module)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        self._signals = StopRequests(trainer, self.sync)
        self._callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, ConsensusCallback) for callback in self._callbacks):
            self._callbacks.insert(0, ConsensusCallback(self.meet, self._heed_signals))

    def _share_overflows(self) -> None:
        """A scaler of which every replica has the same scale: where one overflows, all skip the step."""
        plugin = self.precision_plugin
        if not isinstance(plugin, MixedPrecision) or plugin.scaler is None:
            return
        own = plugin.scaler
        if isinstance(own, ShardedGradScaler):
            return
        plugin.scaler = ShardedGradScaler(
            self.root_device.type,
            init_scale=own.get_scale(),
            growth_factor=own.get_growth_factor(),
            backoff_factor=own.get_backoff_factor(),
            growth_interval=own.get_growth_interval(),
            enabled=own.is_enabled(),
            process_group=None,
        )

    def _curvadion_optimizers(self) -> list[CurvaDion]:
        wrong = [type(optimizer).__name__ for optimizer in self.optimizers if not isinstance(optimizer, CurvaDion)]
        if wrong or not self.optimizers:
            raise MisconfigurationException(
                f"The curvadion strategy needs CurvaDion optimizers, but configure_optimizers returned"
                f" {', '.join(wrong) or 'none'}. Write there:"
                " return CurvaDion(split_parameters(self), lr=0.01)"
                "  # from lightning_curvadion import CurvaDion, split_parameters;"
                " groups with algorithm='adamw' train as under AdamW"
            )
        return [optimizer for optimizer in self.optimizers if isinstance(optimizer, CurvaDion)]

    # -- consensus ---------------------------------------------------------------------------------------------------

    def reach_consensus(self, include_state: bool = False) -> None:
        """Make all replicas one model now; every rank must call it.

        Moving averages of the weights that callbacks keep are averaged too.

        Args:
            include_state: Also average the optimizers' state.
        """
        log.debug(f"{self.__class__.__name__}: reaching consensus, include_state={include_state}")
        with record_function("curvadion::consensus"):
            self.sync.reach_consensus(self._curvadion_optimizers(), include_state=include_state)
            if averages := moving_averages(self._callbacks):
                self.sync.average(averages)

    def _heed_signals(self) -> None:
        assert self._signals is not None
        self._signals.heed()

    def meet(self, include_state: bool = False) -> None:
        """Reach consensus if replicas are training, and all of them are here."""
        if self._training and not self._alone:
            self.reach_consensus(include_state)

    @override
    def on_train_start(self) -> None:
        # By now Lightning has registered its own signal handlers.
        assert self._signals is not None
        self._signals.install()
        self._training = True

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """State of the consensus: what a checkpoint asks for first, on every rank, before it reads the optimizers."""
        self.meet(include_state=True)
        return super().lightning_module_state_dict()

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.sync.expect_other_buffers()

    @override
    def on_train_end(self) -> None:
        self._training = False

    @override
    def on_exception(self, exception: BaseException) -> None:
        self._training = False

    @override
    def teardown(self) -> None:
        self._training = False
        super().teardown()

    # -- checkpoints -------------------------------------------------------------------------------------------------

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        if self._checkpoint_io is None:
            self._checkpoint_io = AtomicCheckpointIO()
        elif isinstance(self._checkpoint_io, _WrappingCheckpointIO) and self._checkpoint_io.checkpoint_io is None:
            self._checkpoint_io.checkpoint_io = AtomicCheckpointIO()
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    # -- collectives of Lightning's own ------------------------------------------------------------------------------

    @property
    def _alone(self) -> bool:
        """Whether this replica handles an exception that the others may not have: nobody would join a collective."""
        module = self.lightning_module
        trainer = module._trainer if module is not None else None
        interrupted = trainer is not None and trainer.state.status == TrainerStatus.INTERRUPTED
        return interrupted and not (self._signals is not None and self._signals.stopping)

    @override
    def barrier(self, *args: Any, **options: Any) -> None:
        if not self._alone:
            with explain_failure(f"the barrier {args[0]!r}" if args else "a barrier"):
                super().barrier(*args, **options)

    @override
    def broadcast(self, obj: TBroadcast, src: int = 0) -> TBroadcast:
        if self._alone:
            return obj
        with explain_failure("a broadcast"):
            return super().broadcast(obj, src)

    @override
    def reduce(self, tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        if self._alone:
            return tensor
        with explain_failure("a reduction of metrics"):
            return super().reduce(tensor, *args, **options)

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        entries = (
            ("curvadion", "popen"),
            ("curvadion_spawn", "spawn"),
            ("curvadion_fork", "fork"),
            ("curvadion_notebook", "fork"),
        )
        for name, start_method in entries:
            strategy_registry.register(
                name,
                cls,
                description=f"CurvaDion strategy with `start_method` '{start_method}'",
                override=True,
                start_method=start_method,
            )


def _leave_process_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _refuse_sparse_embeddings(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse:
            raise MisconfigurationException(
                f"{name} is a {type(part).__name__} with sparse=True, whose gradients CurvaDion cannot step with; build"
                " it with sparse=False"
            )
