"""Checks of what a user configured, before training: each error names what to write instead."""

import inspect
from collections.abc import Iterable
from difflib import get_close_matches

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..optim.curvadion import CurvaDion

# Arguments that make sense for other strategies, so that more is to be said than that they are unknown.
_DDP_ARGUMENTS = {
    *inspect.signature(DistributedDataParallel).parameters,
    "ddp_comm_state",
    "ddp_comm_hook",
    "ddp_comm_wrapper",
    "model_averaging_period",
    "state_dict_type",
}
# Of ModelParallelStrategy, with what to write instead.
_SHARDING_ARGUMENTS = {
    "data_parallel_size": "replica_size is the number of processes over which fully_shard shards a model",
    "tensor_parallel_size": "shard the model by fully_shard alone, over the replica_size processes of a replica",
    "save_distributed_checkpoint": "the checkpoint of a sharded module is a directory, of any other a file",
}


def require_curvadion(optimizers: Iterable[Optimizer]) -> list[CurvaDion]:
    """The optimizers, if there are any and all are CurvaDion.

    Raises:
        MisconfigurationException: Otherwise.
    """
    optimizers = list(optimizers)
    curvadion = [optimizer for optimizer in optimizers if isinstance(optimizer, CurvaDion)]
    others = [type(optimizer).__name__ for optimizer in optimizers if not isinstance(optimizer, CurvaDion)]
    if others or not curvadion:
        raise MisconfigurationException(
            f"The curvadion strategy needs CurvaDion optimizers, but configure_optimizers returned"
            f" {', '.join(others) or 'none'}. Write there:"
            " return CurvaDion(split_parameters(self), lr=0.01)"
            "  # from lightning_curvadion import CurvaDion, split_parameters;"
            " groups with algorithm='adamw' train as under AdamW"
        )
    return curvadion


def refuse_sparse_embeddings(module: nn.Module) -> None:
    """Check that no embedding has sparse gradients.

    Raises:
        MisconfigurationException: One has.
    """
    for name, part in module.named_modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse:
            raise MisconfigurationException(
                f"{name} is a {type(part).__name__} with sparse=True, whose gradients CurvaDion cannot step with; build"
                " it with sparse=False"
            )


def refuse_arguments(arguments: Iterable[str], known: Iterable[str]) -> None:
    """Check that nothing is left of a strategy's arguments once the known ones are taken out.

    Args:
        arguments: Names of those that are left.
        known: Names of the known ones, to suggest the nearest.

    Raises:
        MisconfigurationException: An argument of ``DistributedDataParallel`` or of a sharded strategy, or an unknown
            one.
    """
    arguments = list(arguments)
    for argument in arguments:
        if argument in _SHARDING_ARGUMENTS:
            raise MisconfigurationException(
                f"{argument}: CurvaDionStrategy has no such argument; {_SHARDING_ARGUMENTS[argument]}"
            )
        if argument not in _DDP_ARGUMENTS:
            nearest = get_close_matches(argument, list(known), n=1)
            suggestion = f"; did you mean {nearest[0]}?" if nearest else ""
            raise MisconfigurationException(f"{argument}: CurvaDionStrategy has no such argument{suggestion}")
    if "state_dict_type" in arguments:
        raise MisconfigurationException(
            "state_dict_type: CurvaDionStrategy, like DDPStrategy, has no sharded checkpoints, since every replica"
            " holds the whole model; leave it out, and a checkpoint is one file of the consensus"
        )
    if arguments:
        raise MisconfigurationException(
            f"{', '.join(arguments)}: CurvaDionStrategy does not wrap the model in DistributedDataParallel, whose"
            " arguments and communication hooks have no meaning here; leave it out, or use strategy='ddp'. Inside of a"
            " replica of several processes (replica_size) it does, and takes all but its communication hooks"
        )


def check_elastic(
    elastic: bool,
    min_replicas: int | None,
    heterogeneous: bool,
    replica_size: object,
    process_group_backend: str | None,
    start_method: str,
) -> None:
    """Check the arguments of a strategy that say whether replicas come and go.

    Raises:
        MisconfigurationException: They do not fit together.
    """
    if not elastic:
        if min_replicas is not None:
            raise MisconfigurationException("min_replicas: only with elastic=True can replicas be lost; leave it out")
        return
    if min_replicas is not None and (isinstance(min_replicas, bool) or min_replicas < 1):
        raise MisconfigurationException(f"min_replicas must be at least 1, not {min_replicas}")
    if heterogeneous:
        raise MisconfigurationException(
            "elastic=True: replicas that are lost must have taken the same steps as the others; leave out heterogeneous"
        )
    if replica_size != 1:
        raise MisconfigurationException(
            "elastic=True: replicas of one process come and go, and of a replica of several none can be lost alone;"
            " leave out replica_size"
        )
    if process_group_backend not in (None, "gloo"):
        raise MisconfigurationException(
            f"elastic=True: {process_group_backend=} is not supported, since a group of gloo alone can be left"
            " and formed again; leave it out"
        )
    if start_method != "popen":
        raise MisconfigurationException(
            f"elastic=True: start_method={start_method!r} ends all processes where one is lost; leave it out"
        )
