"""Python as if some optional packages were not installed; on the path of the processes that tests start.

torchmetrics imports them wherever they are, which took 3 of the 8 seconds of a start, and replicas have no use for
them. It also shows that the package works without its extras.
"""

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
