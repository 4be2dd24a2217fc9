"""ElasticStrategy: replicas that may be lost and come, and what all of them do together between steps."""

import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.strategies.strategy import TBroadcast
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors
from typing_extensions import override

from ..sync.collectives import broadcast_plain
from ..sync.errors import explain_failure
from ..sync.membership_changes import MembershipChange
from .configuration_checks import check_elastic
from .elastic import ElasticRun
from .lightning_internals import IndependentProcessesLauncher
from .replica_strategy import ReplicaStrategy, leave_process_group_at_exit

T = TypeVar("T")
# The store that a process has started for itself and its child processes.
_STORE = "CURVADION_STORE"


class ElasticStrategy(ReplicaStrategy):
    """A :class:`ReplicaStrategy` whose replicas may be lost, and come, while the others train on.

    Args:
        elastic: Whether they may.
        min_replicas: Fewer wait for others; ``None`` is 1.
        heterogeneous: Whether they take different numbers of steps.
        **arguments: Of ``ReplicaStrategy``.

    Attributes:
        membership_changes: What happened to the replicas in this fit, as this one saw it.

    Raises:
        MisconfigurationException: Arguments that do not fit together.
    """

    # Whether this process starts the store of its machine.
    _is_host = False

    def __init__(self, elastic: bool, min_replicas: int | None, heterogeneous: bool, **arguments: Any) -> None:
        fixed = {name: arguments[name] for name in ("replica_size", "process_group_backend", "start_method")}
        check_elastic(elastic, min_replicas, heterogeneous, **fixed)
        super().__init__(**arguments)
        self._elastic = ElasticRun(min_replicas or 1, self._timeout) if elastic else None
        self.membership_changes: list[MembershipChange] = self._elastic.changes if self._elastic is not None else []

    @property
    def _alone(self) -> bool:
        """Whether nobody would join a collective of this rank."""
        return self._elastic is not None and self._elastic.has_left

    @property
    @override
    def global_rank(self) -> int:
        return self._elastic.rank if self._elastic is not None else super().global_rank

    @property
    @override
    def world_size(self) -> int:
        return self._elastic.size if self._elastic is not None else super().world_size

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        if self._elastic is None:
            return super().distributed_sampler_kwargs
        return {"num_replicas": self.world_size, "rank": self.global_rank % self.world_size}

    @override
    def _configure_launcher(self) -> None:
        environment = self.cluster_environment
        if self._elastic is None or environment is None:
            super()._configure_launcher()
            return
        addressed = {"MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", _STORE} & set(os.environ)
        if not addressed and not environment.creates_processes_externally:
            # Not the port of MASTER_PORT, which other strategies of this process may need. Child processes read it.
            os.environ[_STORE] = f"127.0.0.1:{find_free_network_port()}"
            ElasticStrategy._is_host = True
        self._launcher = IndependentProcessesLauncher(environment, self.num_processes, self.num_nodes)

    @override
    def setup_distributed(self) -> None:
        if self._elastic is None:
            super().setup_distributed()
            return
        environment, module = self.cluster_environment, self.lightning_module
        assert environment is not None
        self._process_group_backend = "gloo"
        fits = module is None or module.trainer.state.fn == TrainerFn.FITTING
        if self._elastic.has_begun or (dist.is_initialized() and not fits):
            # A test after a run is one of the same replicas.
            return
        address = os.environ.get(_STORE) or f"{environment.main_address}:{environment.main_port}"
        self._elastic.start(address, self.num_nodes * self.num_processes, hosts_store=ElasticStrategy._is_host)
        leave_process_group_at_exit()

    @override
    def process_dataloader(self, dataloader: object) -> object:
        dataloader = super().process_dataloader(dataloader)
        if self._elastic is None or self.lightning_module is None:
            return dataloader
        return self._elastic.share_out(dataloader, trains=bool(self.lightning_module.trainer.training))

    def _begin_training(self) -> None:
        if self._elastic is not None:
            self._elastic.begin_training()

    def _begin_epoch(self) -> None:
        if self._elastic is not None:
            self._elastic.begin_epoch()

    def _begin_batch(self) -> None:
        if self._elastic is not None and not self._alone:
            self._elastic.begin_batch()

    def _begin_validation_batch(self) -> None:
        if self._elastic is not None:
            self._elastic.feed_watchdog()

    def _jointly(self, operation: Callable[[], T], what: str = "a consensus") -> T:
        """Run what all replicas run, in a new group again where a replica is lost in it.

        Args:
            operation: Joint.
            what: It is.
        """
        return operation() if self._elastic is None else self._elastic.run_jointly(operation)

    # -- Lightning's own collectives ---------------------------------------------------------------------------------

    @override
    def barrier(self, *args: Any, **options: Any) -> None:
        if not self._alone:
            self._explained_jointly(
                f"the barrier {args[0]!r}" if args else "a barrier", lambda: super(ElasticStrategy, self).barrier()
            )

    @override
    def broadcast(self, obj: TBroadcast, src: int = 0) -> TBroadcast:
        """As in ``DDPStrategy``; with ``elastic`` of strings, numbers and lists alone, since nothing is unpickled.

        Raises:
            TypeError: It is something else.
        """
        if self._alone or not dist.is_initialized():
            return obj
        if self._elastic is None:
            return self._explained_jointly("a broadcast", lambda: super(ElasticStrategy, self).broadcast(obj, src))
        return cast(TBroadcast, self._explained_jointly("a broadcast", lambda: self._broadcast_plain(obj, src)))

    def _broadcast_plain(self, obj: Any, src: int) -> Any:
        try:
            return broadcast_plain(obj, src, torch.device("cpu"))
        except TypeError as error:
            raise TypeError(
                f"broadcast strings, numbers and lists where replicas come and go, not {type(obj).__name__}: with"
                " elastic=True nothing is unpickled from the network"
            ) from error

    @override
    def reduce(self, tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        if self._alone:
            return tensor
        reduce = super().reduce

        def reduce_copy() -> Tensor:
            # It is reduced in place, and once more where a replica is lost.
            own = tensor if self._elastic is None or not isinstance(tensor, Tensor) else tensor.clone()
            return reduce(own, *args, **options)

        return self._explained_jointly("the reduction of a metric", reduce_copy)

    @override
    def all_gather(self, tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        if self._alone:
            return tensor.unsqueeze(0)
        gather = super().all_gather
        return self._explained_jointly("the gathering of a tensor", lambda: gather(tensor, *args, **options))

    def _share_metrics(self, module: nn.Module) -> None:
        """Let the torchmetrics of a module gather their states from the replicas that are there."""

        def gather(tensor: Tensor, group: Any = None) -> list[Tensor]:
            return self._explained_jointly("the gathering of a metric", lambda: gather_all_tensors(tensor, group))

        for metric in module.modules():
            if isinstance(metric, Metric) and metric.dist_sync_fn is None:
                metric.dist_sync_fn = gather

    def _explained_jointly(self, what: str, operation: Callable[[], T]) -> T:
        def explained() -> T:
            with explain_failure(what):
                return operation()

        return self._jointly(explained, what)
