"""A Trainer does under ``curvadion`` what it does under ``ddp``. ``features/`` has a file for each area."""

import pytest
from features import ROWS, Run
from training import ROOT


def run_feature(rank, world, key, folder):
    """The outcome under each strategy."""
    outcomes = {}
    for strategy in ("ddp", "curvadion"):
        run = Run(rank, world, strategy, key[1], folder)
        ROWS[key](run)
        outcomes[strategy] = run.outcome()
    return outcomes


def name_of(key):
    return ", ".join(key).replace("`", "")


@pytest.mark.parametrize("key", [key for key, row in ROWS.items() if callable(row)], ids=name_of)
def test_a_feature_works_as_under_ddp(replicas, tmp_path, key):
    rank0, rank1 = replicas.run(2, run_feature, key, str(tmp_path), timeout=120)
    for name in ("steps", "epochs", "metrics", "files"):
        assert rank0["curvadion"][name] == rank1["curvadion"][name] == rank0["ddp"][name], name
    assert rank0["curvadion"]["parameters"] == rank1["curvadion"]["parameters"], "fit returns one model"
    assert rank0["curvadion"]["validated"] == rank1["curvadion"]["validated"], "one model is validated"


@pytest.mark.parametrize("key", [key for key, row in ROWS.items() if isinstance(row, str)], ids=name_of)
def test_a_feature_that_is_tested_elsewhere_names_a_test_that_exists(key):
    file, test = ROWS[key].split("::")
    assert f"\ndef {test}(" in (ROOT / file).read_text()
