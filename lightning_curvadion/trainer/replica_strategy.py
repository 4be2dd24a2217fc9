"""ReplicaStrategy: processes that form replicas. Nothing communicates between replicas here.

A replica is one process, several that average their gradients at every step, or several that share one module.
"""

import atexit
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from typing_extensions import override

from ..sync.errors import explain_failure
from . import sharded_checkpoints
from .checkpoint_io import AtomicCheckpointIO
from .lightning_internals import WrappingCheckpointIO, give_device_mesh, materialize_shards
from .replica_processes import (
    ReplicaSize,
    check_replica_size,
    make_replica_groups,
    processes_per_replica,
    synchronize_batch_norm_inside,
)
from .sharded_modules import check_shards, holds_shards, may_be_sharded, mesh_of_replica

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

log = logging.getLogger(__name__)


class ReplicaStrategy(DDPStrategy):
    """Lightning's ``DDPStrategy``, in which consecutive processes form replicas that know nothing of each other.

    Args:
        replica_size: Number of processes of a replica; ``"node"`` for those of a node.
        ddp_arguments: Of ``DistributedDataParallel`` inside of a replica.
        **arguments: Of ``DDPStrategy``.

    Raises:
        MisconfigurationException: On a bad ``replica_size``, on a number of processes that it does not divide, and on a
            module that is sharded otherwise than over the processes of a replica.
    """

    def __init__(self, replica_size: ReplicaSize, ddp_arguments: Mapping[str, Any], **arguments: Any) -> None:
        check_replica_size(replica_size)
        super().__init__(**arguments)
        self._replica_size, self._ddp_arguments = replica_size, ddp_arguments
        # This process's counterparts in the other replicas, and the processes of its own, where it has several.
        self._group: ProcessGroup | None = None
        self._inner_group: ProcessGroup | None = None
        self._device_mesh: DeviceMesh | None = None

    @property
    def replica_size(self) -> int:
        """Number of processes of a replica."""
        return processes_per_replica(self._replica_size, self.num_processes, self.world_size)

    @override
    def set_world_ranks(self) -> None:
        super().set_world_ranks()
        # An error before processes are started.
        processes_per_replica(self._replica_size, self.num_processes, self.world_size)

    @override
    def setup_distributed(self) -> None:
        super().setup_distributed()
        shardable = self._replica_size != 1 and may_be_sharded(self.lightning_module)
        if self._inner_group is None and (self.replica_size > 1 or shardable):
            self._group, self._inner_group = make_replica_groups(self.replica_size, self._timeout)
        if shardable:
            assert self._inner_group is not None and self.lightning_module is not None
            self._device_mesh = self._device_mesh or mesh_of_replica(self._inner_group, self.root_device)
            give_device_mesh(self.lightning_module, self._device_mesh)
        if self.replica_size == 1 and min(self.num_nodes, self.num_processes) > 1:
            rank_zero_info(
                f"{self.__class__.__name__}: each of the {self.num_processes} processes of a node is a replica, and"
                " sends to other nodes. With replica_size='node' they are one replica, and send as much as one of them."
            )
        leave_process_group_at_exit()

    @property
    def _sharded(self) -> bool:
        """Whether ``configure_model`` has sharded the module over the processes of this replica."""
        return holds_shards(self.lightning_module)

    @override
    def setup(self, trainer: "pl.Trainer") -> None:
        if not self._sharded:
            super().setup(trainer)
            return
        assert self.model is not None
        check_shards(self.model, self._device_mesh)
        if self._ddp_arguments:
            raise MisconfigurationException(
                f"leave out {', '.join(self._ddp_arguments)}: the module is sharded by fully_shard, and not wrapped in"
                " DistributedDataParallel"
            )
        materialize_shards(self.model, self.root_device)
        # DDPStrategy's would send whole parameters to all processes where it does not train.
        super(ParallelStrategy, self).setup(trainer)

    @override
    def _setup_model(self, model: nn.Module) -> Any:
        """Wrap nothing that is sharded: ``fully_shard`` gathers parameters and averages gradients inside a replica."""
        if not self._sharded:
            return super()._setup_model(model)
        assert self._inner_group is not None, "checked before"
        synchronize_batch_norm_inside(model, self._inner_group)
        return model

    @override
    def configure_ddp(self) -> None:
        """Wrap nothing where a replica is one process: without a reducer, backward communicates nothing."""
        if self.replica_size == 1:
            self._group = self._inner_group = None
            log.debug(f"{self.__class__.__name__}: leaving the module unwrapped")
            return
        assert self.model is not None and self._inner_group is not None
        synchronize_batch_norm_inside(self.model, self._inner_group)
        self._ddp_kwargs = {**self._ddp_arguments, "process_group": self._inner_group}
        super().configure_ddp()

    @override
    def training_step(self, *args: Any, **options: Any) -> STEP_OUTPUT:
        with self._explained("the buffers of a replica"):
            return super().training_step(*args, **options)

    @override
    def backward(self, *args: Any, **options: Any) -> Tensor:
        with self._explained("the gradients of a replica"):
            return super().backward(*args, **options)

    def _explained(self, what: str) -> AbstractContextManager[None]:
        """Where DistributedDataParallel sends something inside of a replica, let an error say what is lost."""
        if self._inner_group is None:
            return nullcontext()
        return explain_failure(
            f"the all-reduce of {what}", torch.distributed.get_process_group_ranks(self._inner_group)
        )

    # -- checkpoints -------------------------------------------------------------------------------------------------

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        if self._checkpoint_io is None:
            self._checkpoint_io = AtomicCheckpointIO()
        elif isinstance(self._checkpoint_io, WrappingCheckpointIO) and self._checkpoint_io.checkpoint_io is None:
            self._checkpoint_io.checkpoint_io = AtomicCheckpointIO()
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        """Shards are read into the place that they have on the device."""
        return self._sharded

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any = None) -> None:
        """As in ``DDPStrategy``; of a sharded module a directory, to which every process writes.

        Raises:
            MisconfigurationException: A sharded module is to be saved elsewhere than in a folder.
        """
        if self._sharded:
            sharded_checkpoints.save(checkpoint, str(filepath), self.broadcast)
        else:
            super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, *args: Any, **options: Any) -> dict[str, Any]:
        """As in ``DDPStrategy``; a sharded module also reads the directory of one, and takes its shards of a file.

        Raises:
            MisconfigurationException: The module is whole and the checkpoint a directory.
        """

        def read(file: _PATH) -> dict[str, Any]:
            return super(ReplicaStrategy, self).load_checkpoint(file, *args, **options)

        path = Path(checkpoint_path)
        if not (self._sharded and sharded_checkpoints.is_sharded_checkpoint(path)):
            return read(checkpoint_path)
        assert self.lightning_module is not None
        return sharded_checkpoints.load(path, self.lightning_module, self.optimizers, read)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if self._sharded:
            assert self.lightning_module is not None
            sharded_checkpoints.load_weights(self.lightning_module, checkpoint["state_dict"], strict)
        else:
            super().load_model_state_dict(checkpoint, strict)


def leave_process_group_at_exit() -> None:
    """Lightning does it for NCCL alone. A process that ends with gloo's threads alive aborts now and then."""
    atexit.unregister(_leave_process_group)
    atexit.register(_leave_process_group)


def _leave_process_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
