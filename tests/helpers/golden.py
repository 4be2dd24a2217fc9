"""The trajectories of the reference Dion under tests/data, and how to run ours beside them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_curvadion import CurvaDion

DATA = Path(__file__).parents[1] / "data"


class Golden:
    """One golden file."""

    def __init__(self, name: str) -> None:
        self._arrays = np.load(DATA / f"{name}.npz")
        meta: dict[str, Any] = json.loads(str(self._arrays["meta"]))
        self.world, self.steps = meta["world"], meta["steps"]
        self.options = {"lr": meta["lr"], "mu": meta["mu"], "rank_fraction": meta["rf"], "weight_decay": meta["wd"]}
        self.count = len(meta["shapes"])

    def tensors(self, rank: int, when: str, what: str) -> list[Tensor]:
        return [torch.from_numpy(self._arrays[f"rank{rank}/{when}/{what}{j}"].copy()) for j in range(self.count)]

    def parameters(self, rank: int) -> list[nn.Parameter]:
        return [nn.Parameter(tensor) for tensor in self.tensors(rank, "init", "param")]


def start_from(optimizer: CurvaDion, parameters: list[nn.Parameter], right_factors: list[Tensor]) -> None:
    optimizer.init_state()
    for parameter, Q in zip(parameters, right_factors, strict=True):
        optimizer.state[parameter]["Q"].copy_(Q)


def assert_follows(golden: Golden, rank: int, optimizer: CurvaDion, parameters: list[nn.Parameter]) -> None:
    """Take all steps with the golden gradients; after each, compare with the golden trajectory."""
    for step in range(golden.steps):
        for parameter, gradient in zip(parameters, golden.tensors(rank, f"step{step}", "grad"), strict=True):
            parameter.grad = gradient
        optimizer.step()
        close = {"rtol": 1e-5, "atol": 1e-5}
        for j, parameter in enumerate(parameters):
            state = optimizer.state[parameter]
            torch.testing.assert_close(parameter.detach(), golden.tensors(rank, f"step{step}", "param")[j], **close)
            torch.testing.assert_close(state["momentum"], golden.tensors(rank, f"step{step}", "momentum")[j], **close)
            Q = golden.tensors(rank, f"step{step}", "Q")[j]
            signs = (Q * state["Q"]).sum(0).sign()
            torch.testing.assert_close(state["Q"] * signs, Q, **close)
