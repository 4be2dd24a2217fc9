"""Ways to step and to synchronise matrices, and a loop that trains parameters of any shape."""

import torch

UPDATES = [{"local_update": "muon"}, {"local_update": "dion", "rank_fraction": 0.5}]
UPDATES += [{"local_update": "sgd", "local_lr": 0.1}]
HOOKS = [
    {"momentum": "displacement"},
    {"momentum": "local"},
    {"momentum": "average"},
    {"momentum": "factors"},
    {"momentum": "factors", "sync_rank_fraction": 0.25},
    {"consensus": "factors"},
    {"consensus": "none"},
]


def train(optimizer, parameters, steps=4, seed=0):
    """Take steps; the gradients are those of a flat vector, whatever the shapes of the parameters."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        flat = torch.randn(sum(p.numel() for p in parameters), generator=generator)
        for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            # One without a gradient, which counts as zero.
            p.grad = None if step == 2 else torch.empty_like(p).copy_(gradient.view(p.shape))
        optimizer.step()
