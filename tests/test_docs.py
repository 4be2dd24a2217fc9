"""What the documentation promises: every public name has an example that the doctests run."""

import inspect

import pytest

import lightning_curvadion
from lightning_curvadion.cli.plan import blueprint, costs, footprint, plan, prediction, speed
from lightning_curvadion.cli.report import comparison, drawing, figures, logs, report
from lightning_curvadion.optim import dion, rmmc
from lightning_curvadion.trainer import metrics

PLANNING = (blueprint, costs, footprint, plan, prediction, speed)
REPORTING = (comparison, drawing, figures, logs, report)
PUBLIC = [getattr(lightning_curvadion, name) for name in lightning_curvadion.__all__] + [
    thing
    for module in (metrics, dion, rmmc, *PLANNING, *REPORTING)
    for name, thing in vars(module).items()
    if inspect.isfunction(thing) or (module is metrics and inspect.isclass(thing))
    if not name.startswith("_") and thing.__module__ == module.__name__
]


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda thing: thing.__name__)
def test_a_public_name_has_an_example_that_runs(thing):
    assert ">>> " in inspect.getdoc(thing)
