"""What a wire format is: one class that turns numbers into bytes and back."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class WireFormat(ABC):
    """How numbers become bytes and back. For a format of your own subclass it, and give the
    object a name with :func:`~lightning_curvadion.register_wire_format`.

    What a format loses stays in the error-feedback residual and is sent later. A format has no state: every replica
    must read what another has written.

    Attributes:
        block: Numbers come in whole blocks of so many, the last one filled up with zeros.
        block_bytes: Bytes of a quantized block.
        mean_format: Name of the format of the mean over more than two replicas, where it is another one.

    Example:
        >>> class Half(WireFormat):
        ...     block, block_bytes = 1, 2
        ...     def quantize_rows(self, numbers, numel):
        ...         return numbers.half().view(torch.uint8)
        ...     def dequantize_rows(self, packed, out):
        ...         return out.copy_(packed.clone().view(torch.half))
        >>> packed = Half().quantize_rows(torch.tensor([[1.0, 0.1]]), numel=2)
        >>> packed.shape, Half().dequantize_rows(packed, torch.empty(1, 2))
        (torch.Size([1, 4]), tensor([[1.0000, 0.1000]]))
    """

    block: int
    block_bytes: int
    mean_format: str | None = None

    @abstractmethod
    def quantize_rows(self, numbers: Tensor, numel: int) -> Tensor:
        """Quantize the rows of a contiguous tensor, unchecked: NaN makes its block anything.

        Args:
            numbers: Shape (rows, elements), of whole blocks; not to be written to.
            numel: How many of all elements are numbers. The others are zeros at the end.

        Returns:
            uint8, shape (rows, bytes), ``block_bytes`` for each block of a row.
        """

    @abstractmethod
    def dequantize_rows(self, packed: Tensor, out: Tensor) -> Tensor:
        """The inverse of :meth:`quantize_rows`.

        Args:
            packed: What it returned on some replica, as a view: ``clone`` it before you view its bytes as numbers.
            out: Receives all elements, contiguous, shape (rows, elements), float32.

        Returns:
            ``out``.
        """


class PlainFormat(WireFormat):
    """Numbers as they are, in a dtype.

    Args:
        dtype: Of a number on the wire.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.block = 1
        self.block_bytes = dtype.itemsize

    def quantize_rows(self, numbers: Tensor, numel: int) -> Tensor:  # noqa: D102
        return numbers.to(self._dtype).view(torch.uint8)

    def dequantize_rows(self, packed: Tensor, out: Tensor) -> Tensor:  # noqa: D102
        # Bytes are copied, not viewed: numbers must start at a multiple of their size.
        numbers = out if out.dtype == self._dtype else torch.empty_like(out, dtype=self._dtype)
        numbers.view(torch.uint8).copy_(packed)
        return out if numbers is out else out.copy_(numbers)
