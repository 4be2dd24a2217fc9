"""Row flags: which rows of large embeddings have moved on any replica, told in one bit a row."""

from collections.abc import Sequence

import torch
from torch import Tensor


def packed_flags(masks: Sequence[Tensor]) -> Tensor:
    """Some flat masks as bytes of eight flags each.

    Example:
        >>> packed_flags([torch.tensor([True, False, True]), torch.tensor([True])])
        tensor([13], dtype=torch.uint8)
    """
    flags = torch.cat(list(masks))
    bits = torch.nn.functional.pad(flags, (0, -flags.numel() % 8)).view(-(-flags.numel() // 8), 8)
    # A sum of bytes would be an int64.
    return (bits * _weights(flags.device)).sum(dim=1, dtype=torch.uint8)


def indices_set_anywhere(gathered: Tensor, masks: Sequence[Tensor]) -> list[Tensor]:
    """The indices at which each mask is set on any replica.

    Args:
        gathered: :func:`packed_flags` of every replica, shape (replicas, bytes).
        masks: This replica's.
    """
    sizes = [mask.numel() for mask in masks]
    anywhere = (gathered.unsqueeze(-1) & _weights(gathered.device)).ne(0).any(dim=0).view(-1)[: sum(sizes)]
    return [mask.nonzero().view(-1) for mask in anywhere.split(sizes)]


def _weights(device: torch.device) -> Tensor:
    return 2 ** torch.arange(8, dtype=torch.uint8, device=device)
