"""Kernel launches: on a GPU each operator starts at least one kernel, at a few microseconds whatever its size."""

from collections import Counter
from typing import Any

from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

# Operators that return memory without touching it, and the profiler's ranges.
_WITHOUT_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
_WITHOUT_KERNEL |= {"_record_function_enter_new", "_record_function_exit"}


class LaunchCounter(TorchDispatchMode):
    """Counts the operators called inside that launch a kernel: not views, allocations and ranges of the profiler.

    An operator that launches several kernels, such as a QR decomposition, counts one, and so does a collective.

    Attributes:
        launches: How often each operator was called, by name.

    Example:
        >>> import torch
        >>> with LaunchCounter() as counter:
        ...     torch.ones(6, device="meta").view(2, 3).mul_(2).sum()
        tensor(..., device='meta', size=())
        >>> counter.launches
        Counter({'ones': 1, 'mul_': 1, 'sum': 1})
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()

    @override
    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.partition("::")[2]
        is_view = any(
            result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns
        )
        if not is_view and name not in _WITHOUT_KERNEL:
            self.launches[name] += 1
        return func(*args, **(kwargs or {}))
