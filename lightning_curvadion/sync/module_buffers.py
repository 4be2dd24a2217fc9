"""Module buffers: they are synchronised with the parameters, since no gradient reaches them."""

from torch import Tensor, nn


class ModuleBuffers:
    """The persistent buffers of a module, and whether they may have changed since the last consensus.

    Attributes:
        changed: Whether they may have.
    """

    def __init__(self) -> None:
        # The module that holds each buffer, by the buffer's name: a callback may replace the tensor itself (SWA does).
        self._holders: dict[str, nn.Module] = {}
        self.changed = False

    def include(self, module: nn.Module) -> None:
        """Take over the persistent buffers of a module."""
        saved = module.state_dict(keep_vars=True)
        names = [name for name, _ in module.named_buffers() if name in saved]
        self._holders = {name: module.get_submodule(name.rpartition(".")[0]) for name in names}

    def synchronize(self) -> dict[str, Tensor]:
        """All buffers by name, for a collective after which they are the same on all replicas."""
        self.changed = False
        return {name: getattr(holder, name.rpartition(".")[2]) for name, holder in self._holders.items()}

    def synchronize_changed(self) -> dict[str, Tensor]:
        """As :meth:`synchronize`, but no buffer where none has changed."""
        return self.synchronize() if self.changed else {}
