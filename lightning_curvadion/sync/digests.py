"""Digests: 64 bits that tell whether replicas hold the same tensor, so that it is sent only where they do not."""

import torch
from torch import Tensor

from ..optim.shards import local_of

# Odd multipliers of splitmix64, as signed integers; products wrap around.
_MULTIPLIERS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
_GOLDEN = -0x61C8864680B583EB
# Elements at a time: the temporaries stay small beside any model.
_AT_A_TIME = 2**20


def digest(tensor: Tensor) -> Tensor:
    """A digest of the bits of a tensor and of their order. Equal bits have equal digests on every device.

    Args:
        tensor: Of any dtype, shape and layout of strides. Of a sharded one it is that of this process's rows.

    Returns:
        int64, shape (), on the tensor's device. A tensor on the meta device has no bits, and costs nothing.

    Example:
        >>> a, b = torch.tensor([2, 0]), torch.tensor([0, 2])
        >>> bool(digest(a) == digest(b)), bool(digest(a) == digest(a.clone()))
        (False, True)
    """
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    if tensor.is_meta:
        return total
    flat = local_of(tensor).detach().reshape(-1)
    for number, part in enumerate(flat.split(_AT_A_TIME) if flat.numel() else ()):
        words = torch.zeros(-(-part.nbytes // 8), dtype=torch.int64, device=part.device)
        words.view(torch.uint8)[: part.nbytes].copy_(part.contiguous().view(torch.uint8))
        first = 1 + number * _AT_A_TIME
        words += torch.arange(first, first + len(words), device=words.device) * _GOLDEN
        for multiplier in _MULTIPLIERS:
            words ^= words >> 30
            words *= multiplier
        total += (words ^ (words >> 31)).sum()
    return total
