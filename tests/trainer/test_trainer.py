"""Everything a Trainer does it does under ``curvadion``, with ``ddp`` beside it as the expectation."""

import pytest
from trainer_rows import ROWS, Run
from training import same


def run_row(rank, world, key, folder):
    told = {}
    for strategy in ("ddp", "curvadion"):
        run = Run(rank, world, strategy, key[1], folder)
        run.folder.mkdir(parents=True, exist_ok=True)
        ROWS[key](run)
        told[strategy] = run.told()
    return told


@pytest.mark.parametrize("key", ROWS, ids=lambda key: ", ".join(key).replace("`", ""))
def test_a_row(replicas, tmp_path, key):
    a, b = replicas.run(2, run_row, key, str(tmp_path), timeout=120)
    for name in ("steps", "epochs", "metrics", "files"):
        assert a["curvadion"][name] == b["curvadion"][name] == a["ddp"][name], name
    for ours, theirs in zip(a["curvadion"]["parameters"], b["curvadion"]["parameters"], strict=True):
        assert same(ours, theirs), "what fit returns is one model"
    for ours, theirs in zip(a["curvadion"]["validated"], b["curvadion"]["validated"], strict=True):
        assert same(ours, theirs), "what is validated is one model"
