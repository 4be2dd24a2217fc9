"""Replicas are one model wherever a callback, or a hook of the module, looks at it."""

import lightning.pytorch as pl
import pytest
from models import parameters_of
from training import Module, same, trainer_for


def fit(rank, world):
    """Parameters of this rank: after a local step, before and in validation, and at the end."""
    pl.seed_everything(0, verbose=False)
    module = Module()
    # The last step is a local one.
    trainer_for(rank, world, max_steps=10, val_check_interval=4, limit_val_batches=2).fit(module)
    return {
        "local": module.after_step_4,
        "before": module.before_validation,
        "validated": module.validated,
        "final": parameters_of(module),
    }


@pytest.fixture(scope="module")
def fitted(replicas):
    return replicas.run(2, fit)


def test_one_model_is_validated_and_fit_returns_one_model(fitted):
    a, b = fitted
    assert len(a["validated"]) == 4 and all(same(x, y) for x, y in zip(a["validated"], b["validated"], strict=True))
    assert same(a["final"], b["final"])


def test_hooks_of_the_module_find_the_consensus_before_validation(fitted):
    # Step 4 is a local one, and no checkpoint is due: without a consensus the ranks would validate different models.
    a, b = fitted
    assert not same(a["local"], b["local"])
    assert same(a["before"][0], b["before"][0]) and same(a["before"][0], a["validated"][0][: len(a["local"])])
