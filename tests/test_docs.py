"""Every public name, and every function of the metrics, the mathematics and the commands, has an example that runs."""

import inspect
from importlib import import_module
from pkgutil import iter_modules

import pytest

import lightning_curvadion
from lightning_curvadion.cli import plan, report
from lightning_curvadion.optim import dion, rmmc
from lightning_curvadion.trainer import metrics

COMMANDS = [
    import_module(f"{command.__name__}.{module.name}")
    for command in (plan, report)
    for module in iter_modules(command.__path__)
]
PUBLIC = [getattr(lightning_curvadion, name) for name in lightning_curvadion.__all__] + [
    thing
    for module in (metrics, dion, rmmc, *COMMANDS)
    for name, thing in vars(module).items()
    if inspect.isfunction(thing) or (module is metrics and inspect.isclass(thing))
    if not name.startswith("_") and thing.__module__ == module.__name__
]


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda thing: thing.__name__)
def test_a_public_name_has_an_example_that_runs(thing):
    assert ">>> " in inspect.getdoc(thing)
