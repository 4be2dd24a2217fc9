"""Parameter groups: their options, and an error for each bad one."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

Group = dict[str, Any]

ALGORITHMS = ("dion", "adamw", "lion")
LOCAL_UPDATES = ("muon", "dion", "sgd")
LR_SCALES = ("spectral", "match_rms_adamw")
TRAINABLE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
GROUP_OPTIONS = (
    "algorithm",
    "lr",
    "mu",
    "rank_fraction",
    "local_update",
    "local_lr",
    "betas",
    "weight_decay",
    "eps",
    "flatten",
    "transposed",
    "packed",
    "lr_scale",
)
# What a state that was saved without an option means by it.
OPTIONS_SINCE_0_1_0: Group = {"flatten": False, "transposed": False, "packed": 1, "lr_scale": "spectral"}


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")


def check_initialized(named: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ValueError where a parameter has no shape yet, as those of lazy modules before their first batch."""
    for name, parameter in named:
        if is_lazy(parameter):
            raise ValueError(
                f"{name} has no shape yet, as a parameter of a lazy module: send one batch through the module before,"
                " such as in configure_model or setup, so that every replica has the same shapes"
            )


def check_group(group: Group, names: Sequence[str]) -> None:
    """Check the options of a group and that its algorithm can take its parameters.

    Args:
        group: A complete group, defaults filled in.
        names: What to call each parameter in an error.

    Raises:
        ValueError: Naming the argument or parameter, and the remedy.
    """
    check_choice("algorithm", group["algorithm"], ALGORITHMS)
    check_choice("local_update", group["local_update"], LOCAL_UPDATES)
    check_choice("lr_scale", group["lr_scale"], LR_SCALES)
    for name in ("flatten", "transposed"):
        if not isinstance(group[name], bool):
            raise ValueError(f"{name} must be True or False, not {group[name]!r}")
    if isinstance(group["packed"], bool) or not isinstance(group["packed"], int) or group["packed"] < 1:
        raise ValueError(
            f"packed must be an integer >= 1, the number of matrices in a parameter, not {group['packed']!r}"
        )
    for name in ("lr", "weight_decay", "eps", "local_lr"):
        value = group[name]
        if value is not None and not 0 <= value < torch.inf:
            raise ValueError(f"{name} must be a finite number >= 0, not {value}")
    if not 0 <= group["mu"] < 1:
        raise ValueError(f"mu must be in [0, 1), not {group['mu']}: it is the share of the momentum kept at each step")
    if not 0 < group["rank_fraction"] <= 1:
        raise ValueError(f"rank_fraction must be in (0, 1], not {group['rank_fraction']}: 1.0 means full rank")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas must be two numbers in [0, 1), not {group['betas']}")
    if group["local_update"] == "sgd" and group["local_lr"] is None:
        raise ValueError('local_update="sgd" needs local_lr, the learning rate of the local step, such as local_lr=0.1')
    check_initialized(zip(names, group["params"], strict=True))
    for name, parameter in zip(names, group["params"], strict=True):
        _check_parameter(parameter, name, group["algorithm"])
        if group["algorithm"] == "dion" and group["packed"] > 1:
            _check_packed(parameter, name, group)


def _check_parameter(parameter: Tensor, name: str, algorithm: str) -> None:
    _check_layout(parameter, name)
    if not parameter.is_floating_point():
        raise ValueError(
            f"{name} is {parameter.dtype}; only real floating-point parameters can be trained"
            " (a complex one as its real and imaginary part)"
        )
    if parameter.dtype not in TRAINABLE_DTYPES:
        raise ValueError(
            f"{name} is {parameter.dtype}, which has no arithmetic to train in: keep it in bfloat16 or float32 and"
            " cast it in the forward pass, or leave it out of the groups if it is frozen"
        )
    if algorithm == "dion" and (parameter.dim() < 2 or parameter.numel() == 0):
        raise ValueError(
            f'{name} has shape {tuple(parameter.shape)}, but algorithm="dion" takes matrices;'
            ' put it in a group with algorithm="adamw" or "lion" (split_parameters(module) makes such groups)'
        )


def _check_layout(parameter: Tensor, name: str) -> None:
    """Check of a DTensor, of which this room knows no more, that it is cut by rows over one group of processes."""
    placements = getattr(parameter, "placements", None)
    if placements is not None and not (len(placements) == 1 and placements[0].is_shard(0)):
        raise ValueError(
            f"{name} is a DTensor, laid out as {placements}: a replica may be sharded by its first dimension over the"
            " processes of one group, so call fully_shard(model, mesh=mesh['inner']) with a mesh of one dimension and"
            " the default placement, and leave out tensor parallelism"
        )


def _check_packed(parameter: Tensor, name: str, group: Group) -> None:
    """Check that the matrices of a parameter can be taken apart."""
    outputs = (1 if group["flatten"] else -1) if group["transposed"] else (0 if group["flatten"] else -2)
    if parameter.shape[outputs] % group["packed"]:
        raise ValueError(
            f"{name} has shape {tuple(parameter.shape)}, whose {parameter.shape[outputs]} outputs are not"
            f" {group['packed']} matrices of one size: leave packed=1, which steps them as one matrix"
        )
    if group["transposed"] and not group["flatten"] and parameter.dim() > 2:
        raise ValueError(
            f"{name} has shape {tuple(parameter.shape)}, a batch of matrices stored (fan in, fan out), which packed"
            " cannot take apart: leave packed=1, or store them (fan out, fan in)"
        )


def check_saved_groups(saved: Sequence[Group], own: Sequence[Group]) -> None:
    """Check that saved groups hold the same parameters as those of the optimizer that loads them.

    By number, and by name where both have the same names.

    Raises:
        ValueError: They do not. It lists both.
    """
    sizes = [[len(group["params"]) for group in groups] for groups in (saved, own)]
    names = [[group.get("param_names", []) for group in groups] for groups in (saved, own)]
    renamed = set(chain(*names[0])) != set(chain(*names[1]))
    if sizes[0] == sizes[1] and (renamed or names[0] == names[1]):
        return
    listed = [
        ", ".join(f"{group.get('name', 'a group')} ({group['algorithm']}, {len(group['params'])})" for group in groups)
        for groups in (saved, own)
    ]
    raise ValueError(
        f"the state was saved with other parameter groups: {listed[0]}. Here: {listed[1]}. Build the groups as they"
        " were, or load the weights without the state of the optimizer. Since version 0.1.0 split_parameters puts"
        " transformers' Conv1D, experts, depthwise convolutions and packed projections in groups of their own;"
        ' options={"dion": {"packed": 1}} leaves the last among the matrices'
    )
