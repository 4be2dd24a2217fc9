"""CurvaDion as the public code of its authors means it (arXiv:2512.13728), for the comparison."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_curvadion import CurvaDion
from lightning_curvadion.optim.curvadion import StepReport
from lightning_curvadion.optim.local_step import local_step
from lightning_curvadion.optim.rmmc import relative_change, tensor_norms


class AuthorsCurvaDion(CurvaDion):
    """Replicas that step alone, with the mean gradient where the largest RMMC is above tau.

    It communicates by itself, without a hook. Parameters and momenta are never averaged, so replicas drift apart.

    Attributes:
        min_norm: Momenta with a smaller norm do not count in RMMC. The authors' value; with 0 all count, and the first
            change is infinite.
    """

    min_norm = 0.1

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. It is a collective of 4 bytes, and of all gradients where the trigger fires."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stacks = self.matrix_stacks()
        rmmc = self.local_rmmc()
        sent = _all_reduce(rmmc, dist.ReduceOp.MAX)
        synced = self._cap.decide(float(rmmc))
        if synced:
            sent += _average([parameter.grad for _, parameter in self.members() if parameter.grad is not None])
        local_step(self, stacks)
        self.last_step = StepReport(rmmc=float(rmmc), synced=synced, bytes_sent=sent)
        return loss

    def local_rmmc(self) -> Tensor:
        """The largest relative change from ``||M||`` to ``||M + G||`` of any parameter, float32.

        M is what the last step left behind: after error feedback for matrices, the first moment for others.
        """
        self.init_state()
        momenta, gradients = [], []
        for group, parameter in self.members():
            if parameter.grad is not None:
                momenta.append(self.state[parameter]["momentum" if group["algorithm"] == "dion" else "exp_avg"])
                gradients.append(parameter.grad)
        before = tensor_norms(momenta)
        changes = relative_change(tensor_norms(torch._foreach_add(momenta, gradients)), before)
        return torch.where(before >= self.min_norm, changes, 0.0).max()


def _all_reduce(tensor: Tensor, op: Any) -> int:
    """Reduce a tensor in place. Returns the bytes sent: none without a process group."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return 0
    dist.all_reduce(tensor, op)
    return tensor.nbytes


def _average(gradients: list[Tensor]) -> int:
    """Replace gradients by their means over the replicas, in one all-reduce. Returns the bytes sent."""
    flat = torch.cat([gradient.flatten().float() for gradient in gradients])
    sent = _all_reduce(flat, dist.ReduceOp.SUM)
    if sent:
        flat /= dist.get_world_size()
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))
    return sent
