"""A GPU that is not there: CUDA tensors without numbers, and what a host would have to wait for.

``FakeTensorMode`` knows shapes, dtypes and devices. An operator that is given a CPU and a CUDA tensor raises, as does
whatever depends on numbers. Collectives are the real functions of torch.distributed, with a backend that sends nothing.
"""

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lightning_curvadion

# What ProcessGroupNCCL carries, without float8 and bool, which older versions or other backends do not.
NCCL_DTYPES = {torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16}
NCCL_DTYPES |= {torch.float32, torch.float64}

_PACKAGE = Path(lightning_curvadion.__file__).parent
_COPIES = ("aten::_to_copy", "aten::copy_", "aten::_foreach_copy_")
# They wait for the device inside: for a status, or for the size of their result.
_WAITING = ("aten::_linalg_check_errors", "aten::_linalg_svd", "aten::_linalg_eigh", "aten::linalg_eig")
_WAITING += ("aten::masked_select", "aten::repeat_interleave")
_MASKED = ("aten::index", "aten::index_put", "aten::index_put_")


class FakeGPU:
    """What is seen of a process with one fake GPU.

    Attributes:
        waits: Who made the host wait for the device, or copied between the two without ``non_blocking``: file and
            function of the package, such as ``"sync/agreement.py _maximum"``.
        collectives: Name, dtype and elements of every tensor of a collective.
        differ: What a comparison answers: whether tensors are not the same on all replicas.
        agreed: What an agreement answers: the RMMC, and a request or 0.
    """

    def __init__(self) -> None:
        self.waits: list[str] = []
        self.collectives: list[tuple[str, torch.dtype, int]] = []
        self.differ = False
        self.agreed = (0.5, 0.0)

    def forget(self) -> None:
        """Begin anew."""
        self.waits, self.collectives = [], []

    def wait(self) -> None:
        """The host waits, for whoever has called."""
        frame = sys._getframe(1)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(_PACKAGE) and not frame.f_code.co_name.startswith("<"):
                self.waits.append(f"{path.relative_to(_PACKAGE).as_posix()} {frame.f_code.co_name}")
                return
            frame = frame.f_back
        self.waits.append("a test")

    def answer(self, tensor: Tensor) -> list[Any]:
        """Numbers of a flat tensor, where the host reads them."""
        if tensor.dtype == torch.bool:
            return [self.differ] * tensor.numel()
        if tensor.dtype == torch.float64:
            return [*self.agreed, *[0.0] * tensor.numel()][: tensor.numel()]
        return [1.0 if tensor.is_floating_point() else 1] * tensor.numel()


_ANSWERS: dict[Any, Callable[[FakeGPU, Tensor], Any]] = {
    **dict.fromkeys((Tensor.item, Tensor.__float__, Tensor.__int__), lambda gpu, asked: gpu.answer(asked)[0]),
    # Nothing is wrong: the flags that the host reads are raised where something is.
    Tensor.__bool__: lambda gpu, asked: False,
    # All replicas describe their models alike.
    **dict.fromkeys((torch.equal, Tensor.equal), lambda gpu, asked: True),
    # Every element is set.
    **dict.fromkeys(
        (torch.nonzero, Tensor.nonzero),
        lambda gpu, asked: asked.new_zeros(asked.numel(), asked.dim(), dtype=torch.int64),
    ),
}


class _Reads(TorchFunctionMode):
    """Answers where the host asks for numbers, and counts it."""

    def __init__(self, gpu: FakeGPU) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = _ANSWERS.get(func)
        if answer is None or not args[0].is_cuda:
            return func(*args, **(kwargs or {}))
        self._gpu.wait()
        return answer(self._gpu, args[0])


class _Operators(TorchDispatchMode):
    """Sees every operator: copies, collectives, and two devices in one call."""

    def __init__(self, gpu: FakeGPU) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name == "prim::device":
            return result
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)]
        if name.startswith("c10d::"):
            self._see_collective(name, tensors)
        elif name in _COPIES:
            devices = {tensor.fake_device for tensor in (*tensors, result) if isinstance(tensor, FakeTensor)}
            arguments = dict(zip([argument.name for argument in func._schema.arguments], args, strict=False))
            if len(devices) > 1 and not {**arguments, **(kwargs or {})}.get("non_blocking", False):
                self._gpu.wait()
        elif name in _WAITING or (name in _MASKED and any(_is_mask(index) for index in tree_leaves(args[1]))):
            self._gpu.wait()
        # torch lets a CPU number take part in arithmetic, but not in torch.stack and its like.
        elif len({tensor.fake_device for tensor in tensors}) > 1:
            raise AssertionError(f"{name} of {[(tuple(t.shape), t.dtype, t.device) for t in tensors]}")
        return result

    def _see_collective(self, name: str, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            what = f"{name} of {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            assert tensor.is_cuda, f"NCCL carries tensors of the GPU only: {what}"
            assert tensor.dtype in NCCL_DTYPES, f"NCCL does not carry this dtype: {what}"
            assert tensor.is_contiguous(), f"NCCL carries contiguous tensors only: {what}"
            self._gpu.collectives.append((name.removeprefix("c10d::"), tensor.dtype, tensor.numel()))


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


@contextlib.contextmanager
def _device_guard() -> Iterator[None]:
    """Let CUDA be a device of a torch that was built without it.

    Indexing selects the device first. FakeTensorMode sets a guard that does nothing where torch has CUDA and there is
    no GPU; where torch has none, this sets the guard of meta tensors, which does nothing either.
    """
    if torch.backends.cuda.is_built():
        yield
        return
    c10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so"))
    guards = (ctypes.c_void_p * 21).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14  # c10/core/DeviceType.h
    guards[cuda] = guards[meta]
    try:
        yield
    finally:
        guards[cuda] = None


@contextlib.contextmanager
def fake_cuda(world_size: int, rank: int = 0) -> Iterator[FakeGPU]:
    """A process with a fake GPU, as one of several that are not there.

    Backward needs a real device: give parameters their gradients by hand.

    Args:
        world_size: Number of processes.
        rank: Which of them this is.
    """

    def tolist(tensor: FakeTensor) -> list[Any]:
        if tensor.is_cuda:
            gpu.wait()
        return gpu.answer(tensor)

    gpu = FakeGPU()
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        with (
            mock.patch.object(FakeTensor, "tolist", tolist),
            # What dist.broadcast asks of a GPU, for the sake of float8.
            mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
            _device_guard(),
            FakeTensorMode(),
            _Operators(gpu),
            _Reads(gpu),
        ):
            yield gpu
    finally:
        dist.destroy_process_group()
