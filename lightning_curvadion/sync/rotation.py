"""Rotation: which parameters take part in a sync step, where a sync is spread over several of them."""

from collections.abc import Mapping

from torch import Tensor


def rotation_part(parameters: Mapping[str, Tensor], spread: int, turn: int) -> dict[str, Tensor]:
    """The parameters whose turn it is, of parts that are balanced by size.

    The largest parameter goes first, each to the part that is smallest so far. So the parts are the same on all
    replicas. A parameter is not divided.

    Args:
        parameters: By name, in the same order on every replica.
        spread: Number of parts.
        turn: Number of the sync step.

    Example:
        >>> import torch
        >>> parameters = {name: torch.empty(n) for name, n in {"a": 5, "b": 2, "c": 3, "d": 1}.items()}
        >>> [list(rotation_part(parameters, 2, turn)) for turn in range(3)]
        [['a', 'd'], ['b', 'c'], ['a', 'd']]
    """
    sizes = [0] * spread
    part_of: dict[str, int] = {}
    for name in sorted(parameters, key=lambda name: -parameters[name].numel()):
        part_of[name] = sizes.index(min(sizes))
        sizes[part_of[name]] += parameters[name].numel()
    return {name: parameter for name, parameter in parameters.items() if part_of[name] == turn % spread}
