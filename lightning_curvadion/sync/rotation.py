"""Rotation: which parameters take part in a sync step, where a sync is spread over several of them."""

from collections.abc import Mapping, Sequence

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
    names = list(parameters)
    parts = balanced_parts([parameter.numel() for parameter in parameters.values()], spread)
    return {names[number]: parameters[names[number]] for number in parts[turn % spread]}


def balanced_parts(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Share out things of some sizes: the largest goes first, each to the part that is smallest so far.

    Example:
        >>> balanced_parts([5, 2, 3, 1], 2)
        [[0, 3], [1, 2]]
    """
    totals = [0] * count
    parts: list[list[int]] = [[] for _ in range(count)]
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        smallest = totals.index(min(totals))
        parts[smallest].append(number)
        totals[smallest] += sizes[number]
    return [sorted(part) for part in parts]
