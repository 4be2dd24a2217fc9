"""Replicas that are sharded over their processes, in a process group of the pool."""

import torch
from models import EXACT
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from lightning_curvadion import CurvaDion, ProcessGroupSync, split_parameters


class Experts(nn.Module):
    """A batch of matrices, fewer than would divide evenly."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.2 * torch.randn(3, width, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,kio->bo", x, self.weight)


class Layers(nn.Module):
    """Matrices of every layout, of which rows do not divide evenly, a parameter of one number, and a buffer."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mlp = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(3))
        self.wide = nn.Linear(3 * width, width)
        self.conv = nn.Conv1d(1, width, 3, padding=1)
        self.experts = Experts(width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 11)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, tokens: Tensor) -> Tensor:
        # Of this process's data.
        self.seen.add_(tokens.double().mean())
        x = self.embedding(tokens)
        x = x + self.wide(torch.tanh(self.qkv(x)))
        for layer in self.mlp:
            x = x + layer(torch.tanh(x))
        x = x + self.conv(x.unsqueeze(1)).mean(dim=2) + self.experts(x)
        return self.head(self.norm(x)) * self.scale


def layers(seed: int = 0) -> Layers:
    torch.manual_seed(seed)
    return Layers()


def attach_sharded(world, size, model, hook=None, options=None, **arguments):
    """The model under fully_shard, its linear layers apart, and its optimizer with a hook of two levels over EXACT."""
    # Seconds to import.
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world // size, size), mesh_dim_names=("replica", "inner"))
    for part in [part for part in model.modules() if isinstance(part, nn.Linear)]:
        fully_shard(part, mesh=mesh["inner"])
    fully_shard(model, mesh=mesh["inner"])
    optimizer = CurvaDion(split_parameters(model, options=options), **{"lr": 0.02, **arguments})
    sync = ProcessGroupSync(
        **{**EXACT, "momentum": "local", **(hook or {})},
        group=mesh.get_group("replica"),
        inner_group=mesh.get_group("inner"),
    )
    optimizer.register_sync_hook(sync)
    sync.include_module(model)
    return model, optimizer
