"""LoadNotice: a module says when its parameters are loaded, since a rollback is no step."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Notify = Callable[[Iterable[Tensor]], None]


class LoadNotice:
    """A hook that modules call after ``load_state_dict``.

    Args:
        notify: Bound method that receives the parameters. It is not kept alive; ``None`` makes the hook do nothing.
    """

    def __init__(self, notify: Notify | None = None) -> None:
        self._notify = weakref.WeakMethod(notify) if notify is not None else None

    def __call__(self, module: nn.Module, _: Any) -> None:
        """A module has loaded; each of its parts calls for itself."""
        notify = self._notify() if self._notify is not None else None
        if notify is not None:
            notify(module.parameters(recurse=False))

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the module does not train with the optimizer, and a process group cannot be copied.
        return LoadNotice, ()


def notify_of_loads(module: nn.Module, notify: Notify) -> None:
    """Call ``notify`` with the parameters of every part of a module that loads a state, while its object lives."""
    handles: list[RemovableHandle] = [
        part.register_load_state_dict_post_hook(LoadNotice(notify)) for part in module.modules()
    ]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    weakref.finalize(notify.__self__, remove)  # type: ignore[attr-defined]
