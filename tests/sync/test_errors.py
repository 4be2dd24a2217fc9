"""A collective that fails because of another rank is an error that begins with what to do."""

import pytest
from models import build, train_step
from replicas import Failed

from lightning_curvadion.sync.errors import explain_failure


def lost_rank(rank, world):
    model, optimizer = build(hook={})
    if rank == 1:
        raise RuntimeError("this rank gives up")
    train_step(model, optimizer, 0, rank)


def test_a_lost_rank_is_an_error_and_not_a_hang(replicas):
    with pytest.raises(Failed) as caught:
        replicas.run(2, lost_rank, timeout=50)
    survivor, lost = str(caught.value).split("rank 1:\n")
    assert "this rank gives up" in lost and "this rank gives up" not in survivor
    assert "ReplicaLostError: Read the output of the other ranks" in survivor
    assert "Rank 0 lost the connection to another rank during the RMMC all-reduce" in survivor


def test_an_error_that_is_about_no_other_rank_stays_as_it_is():
    with pytest.raises(RuntimeError, match=r"^out of memory$") as caught, explain_failure("an all-reduce"):
        raise RuntimeError("out of memory")
    assert type(caught.value) is RuntimeError
