"""Untrained tensors: what a model holds beside the parameters that a step trains, and replicas must share all the same.

No gradient reaches them, so no mean of gradients keeps them equal under DDP either: there they are equal because the
parameters are. Here the replicas' parameters differ between two sync steps, and with them whatever follows them.
"""

from collections.abc import Iterable

from torch import Tensor, nn

from .sharding_checks import reshard


class UntrainedTensors:
    """Persistent buffers of a module, and its parameters outside every optimizer."""

    def __init__(self) -> None:
        self._module: nn.Module | None = None
        self._persistent: set[str] = set()
        self._trained: set[Tensor] = set()

    def include(self, module: nn.Module) -> None:
        """Take over the persistent buffers of a module, and its parameters outside every optimizer."""
        self._module = module
        self._persistent = {name for name, _ in module.named_buffers()} & module.state_dict(keep_vars=True).keys()

    def reshard(self) -> None:
        """Let the module hold its trained parameters alone, if it is sharded."""
        if self._module is not None:
            reshard(self._module)

    def exclude(self, parameters: Iterable[Tensor]) -> None:
        """Leave out the parameters of an optimizer."""
        self._trained.update(parameters)

    def buffers(self) -> dict[str, Tensor]:
        """The buffers by name, as they are now: a callback may have replaced a tensor by another one (SWA does)."""
        if self._module is None:
            return {}
        return {name: buffer for name, buffer in self._module.named_buffers() if name in self._persistent}

    def parameters_outside(self) -> dict[str, Tensor]:
        """Parameters that no optimizer holds by name, such as those of an EMA teacher or of a target network."""
        if self._module is None:
            return {}
        return {name: p for name, p in self._module.named_parameters() if p not in self._trained}
