"""Small models, data and loops that the tests share."""

import torch
from torch import Tensor, nn

from lightning_curvadion import CurvaDion, ProcessGroupSync, split_parameters


class Net(nn.Module):
    """Matrices of both orientations in stacks and alone, an embedding, a norm, biases, and buffers of both kinds."""

    def __init__(self, layers: int = 2, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(layers))
        # Not behind the biases: it would cancel them, and AdamW would step along the rounding of a zero gradient.
        self.batch_norm = nn.BatchNorm1d(width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.batch_norm(self.embedding(tokens))
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.tanh(up(x)))
        return self.head(self.norm(x))


# The hook whose means are exact and whose steps wait: what a test says of it, it says of the method.
EXACT = {"wire_format": "float32", "momentum": "factors", "lag": 0}


def exact_sync(**hook) -> ProcessGroupSync:
    """A hook of the given arguments over EXACT."""
    return ProcessGroupSync(**{**EXACT, **hook})


class QuantizesAlone(ProcessGroupSync):
    """A hook that makes one replica take sync steps, which it would leave out: quantized as among several."""

    world_size = property(lambda self: max(2, super().world_size))


def build(
    layers: int = 2, hook: dict | None = None, seed: int = 0, hook_class: type = ProcessGroupSync, **options
) -> tuple[Net, CurvaDion]:
    """The same model and optimizer everywhere; with ``hook`` a ProcessGroupSync of those arguments over EXACT."""
    torch.manual_seed(seed)
    model = Net(layers)
    optimizer = CurvaDion(split_parameters(model), **options)
    if hook is not None:
        sync = hook_class(**{**EXACT, **hook})
        optimizer.register_sync_hook(sync)
        sync.include_module(model)
    return model, optimizer


def train_step(model: Net, optimizer: CurvaDion, step: int, shard: int) -> None:
    """One step on data that depends on the step and the shard alone."""
    generator = torch.Generator().manual_seed(1000 * shard + step)
    tokens = torch.randint(0, 11, (24,), generator=generator)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(tokens), (3 * tokens + 1) % 11).backward()
    optimizer.step()


def parameters_of(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def state_of(optimizer: CurvaDion) -> dict:
    """A copy of parameters and state, for comparisons before and after."""
    snapshot = {}
    for name, parameter in optimizer.named_parameters():
        snapshot[name] = parameter.detach().clone()
        for key, value in optimizer.state[parameter].items():
            snapshot[f"{name}.{key}"] = value.clone() if isinstance(value, Tensor) else value
    return snapshot


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if isinstance(a[key], Tensor) else a[key] == b[key] for key in a
    )


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape or (6, 4)))


def with_gradients(*parameters: nn.Parameter, seed: int = 0) -> tuple[nn.Parameter, ...]:
    """Give parameters random gradients that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    return parameters
