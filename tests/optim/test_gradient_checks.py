"""Gradients that are not finite or sparse, on one replica."""

import pytest
import torch
from models import build, equal, state_of, train_step
from torch import nn

from lightning_curvadion import CurvaDion


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_changes_nothing(bad):
    model, optimizer = build()
    train_step(model, optimizer, 0, 0)
    before = state_of(optimizer)
    model.up[1].weight.grad[0, 0] = bad
    with pytest.raises(ValueError, match=r"rank 0: up\.1\.weight has a gradient that is not finite"):
        optimizer.step()
    assert equal(before, state_of(optimizer))


def test_a_sparse_gradient():
    embedding = nn.Embedding(5, 4, sparse=True)
    optimizer = CurvaDion([{"params": embedding.parameters(), "algorithm": "adamw"}])
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse gradient; build the embedding with sparse=False"):
        optimizer.step()
