"""What the documentation promises: every public name has an example that the doctests run."""

import inspect

import pytest

import lightning_curvadion
from lightning_curvadion import curvature, dion, metrics

PUBLIC = [getattr(lightning_curvadion, name) for name in lightning_curvadion.__all__] + [
    thing
    for module in (metrics, dion, curvature)
    for name, thing in vars(module).items()
    if callable(thing) and not name.startswith("_") and thing.__module__ == module.__name__
]


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda thing: thing.__name__)
def test_a_public_name_has_an_example_that_runs(thing):
    assert ">>> " in inspect.getdoc(thing)
