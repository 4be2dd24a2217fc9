"""Makes the start of a process cheaper; on the path of every process that the tests start.

Two measures take 60 % off the CPU time of ``import lightning``:

- Some optional packages are hidden. torchmetrics imports them wherever they are installed, and replicas need none of
  them. It also shows that the package works without its extras.
- The garbage collector runs less often during imports, and not at the exit of the interpreter.
"""

import atexit
import gc
import importlib.metadata
import sys

HIDDEN = {"matplotlib": "matplotlib", "scikit-learn": "sklearn", "scipy": "scipy", "transformers": "transformers"}

_version = importlib.metadata.version


def version(distribution_name: str) -> str:
    if distribution_name in HIDDEN:
        raise importlib.metadata.PackageNotFoundError(distribution_name)
    return _version(distribution_name)


importlib.metadata.version = version
for module in HIDDEN.values():
    sys.modules[module] = None  # type: ignore[assignment]

gc.set_threshold(100_000, 50, 100)
atexit.register(gc.freeze)
