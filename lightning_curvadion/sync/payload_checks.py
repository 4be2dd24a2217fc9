"""Whether all that a mean is about to quantize can be quantized, known to all replicas before any of them writes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .payloads import Payload

# A norm bounds every number, and is one fast pass. Below this bound the sum of a parameter, its anchor and its residual
# is below 2**60, and the 64 squares of it that int2 adds up are finite. So is any sum over replicas.
_LARGEST_NORM = 2.0**58


class PayloadCheck:
    """Tells whether a replica's numbers are finite and not far too large, in one byte that travels with the numbers.

    Each replica checks what it is about to send. If that holds on all of them, nothing can overflow later, neither in a
    step of a block nor in a mean: nothing else is checked, and the host waits for the device once.

    Args:
        payloads: The quantized payloads of a mean.
    """

    def __init__(self, payloads: Sequence[Payload]) -> None:
        self._payloads = payloads
        self._flag = _flag(payloads)

    def agree(self, maximum_: Callable[[Tensor], None]) -> None:
        """Let the flag be that of several processes, given what replaces a tensor by its maximum over them."""
        maximum_(self._flag)

    def take_flag(self) -> Tensor:
        """One byte, 1 if a number cannot be quantized; nothing, shape (0,), from the second time on."""
        flag, self._flag = self._flag, self._flag[:0]
        return flag

    def first_unusable(self) -> str | None:
        """Name of the first payload with such a number. The host waits for the device."""
        return next((payload.name for payload in self._payloads if bool(_flag([payload]))), None)


def _flag(payloads: Sequence[Payload]) -> Tensor:
    sources = [source for payload in payloads for source in payload.sources]
    norms = [
        norm
        for dtype in dict.fromkeys(source.dtype for source in sources)
        for norm in torch._foreach_norm([s for s in sources if s.dtype == dtype], 2, dtype=torch.float32)
    ]
    # A NaN compares as false.
    return torch.stack(norms).lt(_LARGEST_NORM).all().logical_not().to(torch.uint8).view(1)
