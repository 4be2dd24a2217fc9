"""AdamW and Lion groups beside torch's AdamW and the paper's equations."""

import pytest
import torch
from models import with_gradients
from torch import nn

from lightning_curvadion import CurvaDion


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3, "betas": (0.8, 0.99), "lr": 0.1, "eps": 1e-3}])
def test_adamw_groups_are_torchs_adamw(options):
    options = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.01, "eps": 1e-8, **options}
    ours, theirs = [nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(1))) for _ in range(2)]
    optimizers = [
        CurvaDion([{"params": [ours], "algorithm": "adamw"}], **options),
        torch.optim.AdamW([theirs], **options),
    ]
    for step in range(6):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            with_gradients(parameter, seed=step)
            if step == 3:
                parameter.grad = None
            optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_lion_groups_follow_the_papers_equations():
    parameter = nn.Parameter(torch.randn(5))
    optimizer = CurvaDion([{"params": [parameter], "algorithm": "lion"}], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    expected, momentum = parameter.detach().clone(), torch.zeros(5)
    for step in range(4):
        with_gradients(parameter, seed=step)
        optimizer.step()
        direction = (0.9 * momentum + 0.1 * parameter.grad).sign()
        expected = expected - 0.01 * (direction + 0.1 * expected)
        momentum = 0.99 * momentum + 0.01 * parameter.grad
        torch.testing.assert_close(parameter.detach(), expected)
