"""Whatever the model, the trigger and the data: all ranks take the same branch, and nothing hangs.

Few examples here; ``CURVADION_EXAMPLES=200 pytest tests/test_properties.py`` tries as many as you like.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import exact_sync
from torch import nn

from lightning_curvadion import (
    CommunicationBudget,
    CurvaDion,
    DriftThreshold,
    EveryNSteps,
    IntegratedRMMC,
    RMMCThreshold,
)
from lightning_curvadion.sync import quantization

EXAMPLES = int(os.environ.get("CURVADION_EXAMPLES", "30"))

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
TRIGGERS = {
    "threshold": RMMCThreshold(0.3),
    "integrated": IntegratedRMMC(0.8),
    "period": EveryNSteps(3),
    "budget": CommunicationBudget(0.4),
    "drift": DriftThreshold(0.05),
}
SIDE = st.integers(1, 9)
MATRIX = st.tuples(SIDE, SIDE)
VECTOR = st.one_of(st.tuples(), st.tuples(SIDE), st.tuples(SIDE, SIDE, SIDE))
STEPS = 6


@st.composite
def jobs(draw):
    """A model, an optimizer, a hook, and which gradients are missing or bad."""
    matrices = draw(st.lists(MATRIX, max_size=4))
    vectors = draw(st.lists(VECTOR, min_size=0 if matrices else 1, max_size=3))
    world = draw(st.integers(1, 3))
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    consensus = draw(st.sampled_from(["average", "factors", "none"]))
    momentum = draw(st.sampled_from(["factors", "dion", "average", "local"]))
    if consensus == "none":
        momentum = draw(st.sampled_from(["factors", "dion"]))
    # The consensus "none" refuses a trigger that watches the drift.
    triggers = sorted(TRIGGERS.keys() - ({"drift"} if consensus == "none" else set()))
    wire_format = draw(st.sampled_from(quantization.WIRE_FORMATS)) if dtype != "float64" else "float32"
    count = len(matrices) + len(vectors)
    missing = draw(
        st.sets(st.tuples(st.integers(0, STEPS - 1), st.integers(0, world - 1), st.integers(0, count - 1)), max_size=12)
    )
    return {
        "matrices": matrices,
        "vectors": vectors,
        "world": world,
        "dtype": dtype,
        "algorithm": draw(st.sampled_from(["adamw", "lion"])),
        "hook": {"consensus": consensus, "momentum": momentum, "wire_format": wire_format, "factor_format": "float32"},
        "trigger": draw(st.sampled_from(triggers)),
        "rank_fraction": draw(st.sampled_from([0.25, 0.5, 1.0])),
        "local_update": draw(st.sampled_from(["dion", "sgd"])),
        "missing": sorted(missing),
        "equal_data": draw(st.booleans()),
        "bad": draw(st.one_of(st.none(), st.tuples(st.integers(0, STEPS - 1), st.integers(0, world - 1)))),
    }


def train(rank, world, job):
    """The steps of a job: for each the branch taken, or the error; and the parameters after it."""
    dtype = DTYPES[job["dtype"]]
    generator = torch.Generator().manual_seed(0)
    shapes = [*job["matrices"], *job["vectors"]]
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    matrices, vectors = parameters[: len(job["matrices"])], parameters[len(job["matrices"]) :]
    groups = [{"params": matrices, "rank_fraction": job["rank_fraction"]}] if matrices else []
    groups += [{"params": vectors, "algorithm": job["algorithm"]}] if vectors else []
    optimizer = CurvaDion(
        groups, lr=0.05, trigger=TRIGGERS[job["trigger"]], local_update=job["local_update"], local_lr=0.05
    )
    optimizer.register_sync_hook(exact_sync(**job["hook"]))
    missing = set(map(tuple, job["missing"]))
    history = []
    for step in range(STEPS):
        data = torch.Generator().manual_seed(step if job["equal_data"] else 100 * rank + step)
        for number, parameter in enumerate(parameters):
            parameter.grad = torch.randn(parameter.shape, generator=data).to(dtype)
            if (step, 0 if job["equal_data"] else rank, number) in missing:
                parameter.grad = None
        graded = [parameter for parameter in parameters if parameter.grad is not None]
        if job["bad"] == (step, rank) and graded:
            graded[0].grad.view(-1)[0] = float("nan")
        before = [parameter.detach().clone() for parameter in parameters]
        try:
            optimizer.step()
            branch = optimizer.last_step.synced
        except ValueError as error:
            branch = str(error)
            assert all(torch.equal(a, b.detach()) for a, b in zip(before, parameters, strict=True))
        history.append((branch, [parameter.detach().clone() for parameter in parameters]))
    return history


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(job=jobs())
def _all_ranks_agree(replicas, job):
    histories = replicas.run(job["world"], train, job, timeout=60)
    average = job["hook"]["consensus"] == "average"
    for step, everyone in enumerate(zip(*histories, strict=True)):
        branches = [branch for branch, _ in everyone]
        assert len(set(branches)) == 1, (step, branches)
        if branches[0] is True and average:
            for _, parameters in everyone[1:]:
                assert all(torch.equal(a, b) for a, b in zip(everyone[0][1], parameters, strict=True)), step
    if job["equal_data"] and job["bad"] is None and job["world"] > 1 and job["hook"]["wire_format"] == "float32":
        (alone,) = replicas.run(1, train, {**job, "world": 1}, timeout=60)
        tolerance = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 0.1}[job["dtype"]]
        for (_, together), (_, single) in zip(histories[0], alone, strict=True):
            for a, b in zip(together, single, strict=True):
                torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.timeout(60 + 3 * EXAMPLES)
def test_all_ranks_take_the_same_branch_and_end_a_sync_step_as_one(replicas):
    _all_ranks_agree(replicas)
