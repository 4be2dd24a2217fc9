"""Whether all replicas are about to train the same model alike: checked before anything is sent in earnest."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..optim.curvadion import CurvaDion
from .collectives import Exchange
from .errors import ReplicaLostError
from .payloads import Averaged

_CODABLE = (torch.float32, torch.float16, torch.bfloat16)
_REMEDY = "build the same model and the same optimizer, in the same order, in every process"


def describe_optimizer(optimizer: CurvaDion) -> list[str]:
    """A line for the trigger and one for each parameter, with all that must be the same on every replica."""
    lines = [f"trigger {type(optimizer.trigger).__name__} {sorted(vars(optimizer.trigger).items())}"]
    names = optimizer.named_parameters()
    for group in optimizer.param_groups:
        options = {key: group[key] for key in ("algorithm", "rank_fraction", "local_update")}
        for parameter in group["params"]:
            name, _ = next(names)
            state = sorted(optimizer.state[parameter])
            trained = "" if parameter.requires_grad else " frozen"
            lines.append(f"{name} {tuple(parameter.shape)} {parameter.dtype}{trained} {options} {state}")
    return lines


def describe_module(module: nn.Module) -> list[str]:
    """A line for each parameter and buffer."""
    everything: list[tuple[str, Tensor]] = [*module.named_parameters(), *module.named_buffers()]
    return [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in everything]


def check_equal(exchange: Exchange, description: list[str], device: torch.device) -> None:
    """Compare descriptions in one small collective.

    Raises:
        ValueError: They differ; on every replica, naming the first difference.
    """
    digest = hashlib.sha256("\n".join(description).encode()).digest()
    own = torch.tensor(list(digest), dtype=torch.uint8, device=device)
    if not all(torch.equal(other, own) for other in exchange.gather(own)):
        raise ValueError(_first_difference(exchange.gather_objects(description)))


def check_formats(exchange: Exchange, optimizer: CurvaDion, formats: dict[str, str], device: torch.device) -> None:
    """Check that parameters can be coded and that the backend carries coded numbers, by letting it.

    By now all replicas are known to be alike, so that all raise or none.

    Args:
        exchange: The process group.
        optimizer: Holder of the parameters.
        formats: Names of arguments and what they say.
        device: Where the parameters are.

    Raises:
        ValueError: Naming the parameter or the backend, and what can be used instead.
    """
    coded = {name: wire_format for name, wire_format in formats.items() if wire_format != "float32"}
    chosen = ", ".join(f"{name}={wire_format!r}" for name, wire_format in coded.items())
    if not coded:
        return
    for name, parameter in optimizer.named_parameters():
        if parameter.dtype not in _CODABLE:
            raise ValueError(
                f"{name} is {parameter.dtype}, which {chosen} cannot code (float32, float16 and bfloat16 it can);"
                " use wire_format='float32', which sends numbers at full width, or train in float32"
            )
    try:
        exchange.average([Averaged("probe", torch.zeros(1, device=device), next(iter(coded.values())))])
    except ReplicaLostError:
        raise
    except RuntimeError as error:
        raise ValueError(
            f"the {exchange.backend} backend cannot carry {chosen} ({error}); wire_format='float32' it can, and gloo"
            " (CPU) and nccl (GPU) carry every format"
        ) from error


def _first_difference(descriptions: Sequence[list[str]]) -> str:
    reference = descriptions[0]
    for rank, other in enumerate(descriptions):
        for ours, theirs in zip(reference, other, strict=False):
            if ours != theirs:
                return f"replicas differ: rank 0 has [{ours}] where rank {rank} has [{theirs}]; {_REMEDY}"
        if len(other) != len(reference):
            return f"replicas differ: rank 0 has {len(reference)} entries and rank {rank} has {len(other)}; {_REMEDY}"
    raise AssertionError("digests differ but descriptions do not")
