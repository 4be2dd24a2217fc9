"""How numbers are coded on the way: pure functions on tensors.

All tensors of an exchange travel in one flat buffer of one dtype, so that a model of any depth costs one collective.
"""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

WIRE_FORMATS = ("float32", "bfloat16")


def wire_dtype(wire_format: str, tensors: Sequence[Tensor]) -> torch.dtype:
    """Dtype of the flat buffer that carries ``tensors``.

    ``"float32"`` loses nothing: float64 tensors travel as float64, and narrower ones gain bits, so that their mean is
    rounded once. ``"bfloat16"`` rounds every number to 8 significant bits.
    """
    if wire_format == "bfloat16":
        return torch.bfloat16
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def pack(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """All numbers of ``tensors`` in one flat tensor of ``dtype``."""
    return torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors])


def unpack(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of :func:`pack`: tensors of the shapes and dtypes of ``like``, views of ``flat`` where possible."""
    pieces = flat.split([tensor.numel() for tensor in like])
    return [piece.view(tensor.shape).to(tensor.dtype) for piece, tensor in zip(pieces, like, strict=True)]


def integers_to_numbers(tensor: Tensor) -> Tensor:
    """The bytes of an integer or boolean tensor as small float32 numbers, exact in a sum with zeros."""
    return tensor.reshape(-1).contiguous().view(torch.int8).float()


def numbers_to_integers(numbers: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`integers_to_numbers`."""
    return numbers.to(torch.int8).view(like.dtype).view(like.shape)
