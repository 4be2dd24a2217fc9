"""What a Trainer does, feature by feature: each trains on two replicas under ``curvadion`` and under ``ddp``.

A file is an area of the table "Works with" in ``examples/guide.md``, which names exactly these features.
"""

from . import callbacks, launch, loops, model, optimisation, precision, tools
from .registry import ROWS, Run

__all__ = ["ROWS", "Run", "callbacks", "launch", "loops", "model", "optimisation", "precision", "tools"]
