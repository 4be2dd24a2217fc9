"""Gradients that are not finite or sparse, and parameters that have changed their shape."""

import pytest
import torch
from models import build, equal, matrix, state_of, train_step, with_gradients
from torch import nn

from lightning_curvadion import CurvaDion, DriftThreshold, IntegratedRMMC, ProcessGroupSync


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


RESHAPED = r"rank 1: {} has another shape than its optimizer's state; build a new optimizer after a module has changed"


@pytest.mark.parametrize("name", ["up.0.weight", "up.0.bias"])
@pytest.mark.parametrize("has_gradient", [True, False])
def test_a_parameter_that_has_changed_its_shape(name, has_gradient):
    model, optimizer = build()
    train_step(model, optimizer, 0, 0)
    before = state_of(optimizer)
    parameter = model.get_parameter(name)
    old = parameter.data
    parameter.grad = None
    parameter.data = torch.randn(40, *parameter.shape[1:])
    if has_gradient:
        with_gradients(parameter)
    with pytest.raises(ValueError, match=RESHAPED.format(name).replace("rank 1", "rank 0")):
        optimizer.step()
    parameter.grad, parameter.data = None, old
    assert equal(before, state_of(optimizer))


def step_twice(optimizer):
    """All ranks know of a bad step in the next one, when they read its agreement."""
    optimizer.step()
    optimizer.step()


def reshape_on_rank_1(rank, world):
    """The errors on this rank, for a matrix and another parameter and for both kinds of triggers."""
    errors = []
    for algorithm in ("dion", "adamw"):
        for trigger in (IntegratedRMMC(0.3), DriftThreshold(0.1)):
            torch.manual_seed(0)
            parameter = matrix(6, 4)
            optimizer = CurvaDion([{"params": [("table", parameter)], "algorithm": algorithm}], trigger=trigger)
            optimizer.register_sync_hook(ProcessGroupSync())
            for step in range(2):
                with_gradients(parameter, seed=step)
                optimizer.step()
            if rank == 1:
                parameter.grad, parameter.data = None, torch.randn(9, 4)
            with_gradients(parameter)
            with pytest.raises(ValueError, match="another shape") as caught:
                step_twice(optimizer)
            errors.append(str(caught.value))
    return errors


def test_all_replicas_raise_where_one_has_changed_a_shape(replicas):
    for errors in replicas.run(2, reshape_on_rank_1):
        assert len(set(errors)) == 1
        assert errors[0].startswith(RESHAPED.format("table")) and errors[0].endswith("No parameter has changed by it.")
