"""What the documentation promises: every public name has an example that the doctests run."""

import inspect

import pytest

import lightning_curvadion
from lightning_curvadion.cli.plan import benchmark, collective_costs, footprint, plan, run_setup, step_prediction
from lightning_curvadion.cli.report import comparison, figures, log_readers, plotting, report
from lightning_curvadion.optim import dion, rmmc
from lightning_curvadion.trainer import metrics

PLANNING = (benchmark, collective_costs, footprint, plan, run_setup, step_prediction)
REPORTING = (comparison, figures, log_readers, plotting, report)
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
