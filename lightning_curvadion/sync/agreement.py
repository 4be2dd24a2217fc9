"""The agreement: the one all-reduce of a local step, after which all replicas take the same branch."""

import torch
from torch import Tensor

from .collectives import Collectives
from .errors import UnevenBatchesError, explain_failure

# In place of a gradient code, below all codes. From a rank that takes no step: above all stop requests.
_NO_STEP = 0.9
# From a rank whose parameters were set to something else: below all stop requests, and repeated until it is agreed on.
_SETTLE = 0.25


class Agreement:
    """An all-reduce of two numbers: the RMMC, and the code of an unusable gradient or a stop request.

    Where a trigger watches the drift it has a third number.

    Args:
        collectives: Of the process group.

    Attributes:
        stop_request: A number in (0.25, 0.9) that asks all replicas for something, such as to stop; 0 for nothing. A
            signal handler may set it: it travels with the next agreement of a step.
        agreed_request: The largest stop request of any replica in the last step; the same on all of them.
        settle_request: Whether this replica asks all to settle their parameters before the next step changes them.
        agreed_to_settle: Whether all replicas settle now; the same on all of them.
        carries_drift: Whether every agreement has the third number: the same on all replicas and for all optimizers of
            a hook, since a rank that takes no step cannot know whose step another one takes.
    """

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives
        self._steps = 0
        self.stop_request = self.agreed_request = 0.0
        self.settle_request = self.agreed_to_settle = False
        self.carries_drift = False

    def message(self, signal: Tensor, drift: Tensor | None = None) -> Tensor:
        """What is sent: the signal, and the drift where agreements carry it.

        Args:
            signal: Float64, shape (2,).
            drift: Float64, shape (1,); ``None`` where there is none, which counts as 0.
        """
        if not self.carries_drift:
            return signal
        return torch.cat([signal, signal.new_zeros(1) if drift is None else drift])

    def reach(self, signal: Tensor, drift: Tensor | None = None) -> tuple[float, float, float]:
        """Find the element-wise maximum over the replicas.

        Args:
            signal: RMMC and gradient code, float64, shape (2,). Codes start at 1, so that an unusable gradient
                outranks a stop request.
            drift: This replica's, see :meth:`message`.

        Returns:
            The largest RMMC, the largest code or stop request, and the largest drift or 0.

        Raises:
            UnevenBatchesError: Another rank takes no step now.
            ReplicaLostError: Another rank has ended, or does not arrive.
        """
        if request := self.stop_request or _SETTLE * self.settle_request:
            signal[1].clamp_(min=request)
        rmmc, code, largest_drift = self._maximum(self.message(signal, drift))
        if code == _NO_STEP:
            raise self._uneven_batches(stepping=True)
        self._steps += 1
        self.agreed_to_settle = code == _SETTLE
        self.agreed_request = code if _SETTLE < code < 1 else 0.0
        return rmmc, code, largest_drift

    def verify_no_step(self, device: torch.device) -> None:
        """Verify that no other rank takes a step now, before a collective that its agreement would not match.

        Sends as much as an agreement; nothing among fewer than two replicas.

        Args:
            device: Of the collectives.

        Raises:
            UnevenBatchesError: Another rank takes a step.
            ReplicaLostError: Another rank has ended, or does not arrive.
        """
        if self._collectives.world_size == 1:
            return
        signal = torch.tensor([-1.0, _NO_STEP], dtype=torch.float64, device=device)
        rmmc, *_ = self._maximum(self.message(signal))
        # RMMC is never negative: somebody has sent one.
        if rmmc >= 0:
            raise self._uneven_batches(stepping=False)

    def _maximum(self, message: Tensor) -> tuple[float, float, float]:
        self._collectives.all_reduce_max(message)
        # With NCCL the all-reduce has only been enqueued: this read is the first to wait for the other ranks.
        with explain_failure("the RMMC all-reduce"):
            rmmc, code, *drift = message.tolist()
        return rmmc, code, drift[0] if drift else 0.0

    def _uneven_batches(self, stepping: bool) -> UnevenBatchesError:
        ranks = self._collectives.all_gather_object((stepping, self._steps))
        positions = [
            f"rank {rank} takes step {steps + 1}" if steps_now else f"rank {rank} ended after {steps} steps"
            for rank, (steps_now, steps) in enumerate(ranks)
        ]
        return UnevenBatchesError(
            "Give every rank the same number of batches, with a DistributedSampler, an IterableDataset of equal length"
            f" on every rank, or limit_train_batches: {', '.join(positions)}."
        )
