"""The agreement: the one all-reduce of a local step, after which all replicas take the same branch."""

from torch import Tensor

from .collectives import Collectives


class Agreement:
    """An all-reduce of two numbers: the RMMC, and the code of an unusable gradient or a stop request.

    Args:
        collectives: Of the process group.

    Attributes:
        stop_request: A number in (0, 1) that asks all replicas for something, such as to stop; 0 for nothing. A signal
            handler may set it: it travels with the next agreement.
        agreed_request: The largest stop request of any replica in the last agreement; the same on all of them.
    """

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives
        self.stop_request = self.agreed_request = 0.0

    def reach(self, signal: Tensor) -> tuple[float, float]:
        """Replace ``signal`` by its element-wise maximum over the replicas.

        Args:
            signal: RMMC and gradient code, float64, shape (2,). Codes start at 1, so that an unusable gradient
                outranks a stop request.

        Returns:
            The largest RMMC, and the largest code or stop request.
        """
        if self.stop_request:
            signal[1].clamp_(min=self.stop_request)
        self._collectives.all_reduce_max(signal)
        rmmc, code = signal.tolist()
        self.agreed_request = code if code < 1 else 0.0
        return rmmc, code
