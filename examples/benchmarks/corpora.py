"""The texts and the models of the comparison."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from examples.byte_gpt import StandardLibrary


class TorchHeaders(StandardLibrary):
    """The C++ headers that come with PyTorch: another language, on every machine that can run the comparison."""

    def __init__(self, cache: str = ".data/headers", **options: Any) -> None:
        super().__init__(cache=cache, **options)

    def files(self) -> Iterable[tuple[str, Path]]:
        """The headers of three libraries, without the generated ones."""
        root = Path(torch.__file__).parent / "include"
        for folder in ("ATen", "c10", "torch"):
            for path in sorted((root / folder).rglob("*.h")):
                name = path.relative_to(root).as_posix()
                if not name.startswith("ATen/ops/"):
                    yield name, path


class Size(NamedTuple):
    """Shape of a byte-level GPT."""

    layers: int
    width: int
    heads: int


CORPORA: dict[str, type[StandardLibrary]] = {"python": StandardLibrary, "headers": TorchHeaders}
SIZES = {"131k": Size(layers=2, width=64, heads=4), "1m": Size(layers=4, width=144, heads=4)}
