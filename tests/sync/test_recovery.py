"""What survivors do with the operation that a loss cut in half, each from where it stands.

``test_elastic.py`` and ``kill_points.py`` do the same with processes that are killed. Here others stand where told.
"""

import pytest

from lightning_curvadion.sync import recovery
from lightning_curvadion.sync.errors import ReplicaLostError


class Survivor(recovery.Recovery):
    """A replica whose groups form with others that stand where a test says."""

    def __init__(self, *others):
        super().__init__(self.form_group)
        self.others, self.groups, self.active = list(others), 0, True

    def form_group(self, own):
        self.groups += 1
        return [dict(own), *(self.others.pop(0) if self.others else [])]


def at(position, again, place="operation"):
    return {"place": place, "position": position, "again": again}


@pytest.fixture(autouse=True)
def everybody_is_here(monkeypatch):
    monkeypatch.setattr(recovery, "meet", lambda _: None)


def cut(times):
    """An operation that is cut in half so many times."""
    left = [None] * times

    def operation():
        if left:
            left.pop()
            raise ReplicaLostError
        return "done"

    return operation


def test_a_step_that_was_cut_in_half_is_not_taken_again():
    survivor = Survivor([at(1, again=False)])
    assert survivor.begin_step()
    survivor.survive_step()
    assert survivor.groups == 1 and survivor.begin_step() and survivor.position == 2


def test_one_that_is_a_step_behind_takes_that_step_alone():
    survivor = Survivor([at(2, again=False)])
    assert survivor.begin_step()
    survivor.survive_step()
    assert not survivor.begin_step(), "the others have given up their second step"
    assert survivor.begin_step()


def test_one_that_is_a_step_behind_an_operation_takes_part_in_it():
    survivor = Survivor([at(2, again=True)])
    assert survivor.begin_step()
    survivor.survive_step()
    assert survivor.run(cut(0)) == "done" and survivor.groups == 1 and survivor.position == 2


def test_an_operation_is_run_again_until_nobody_is_lost_in_it():
    survivor = Survivor([at(1, again=True)], [at(1, again=True)])
    assert survivor.run(cut(2)) == "done"
    assert survivor.groups == 2 and survivor.position == 1


def test_an_operation_that_another_one_has_left_is_done(monkeypatch):
    barrier = cut(1)
    monkeypatch.setattr(recovery, "meet", lambda _: barrier())
    survivor = Survivor([at(2, again=False)])
    runs = []
    survivor.run(lambda: runs.append(1))
    assert len(runs) == 1
    assert not survivor.begin_step(), "the others have given up the step after it"


def test_newcomers_are_met_where_all_are():
    survivor = Survivor([at(1, again=False)], [at(2, again=True, place="batch")])
    assert survivor.begin_step()
    survivor.meet_newcomers()
    assert survivor.groups == 2, "another one was lost on the way to them"


def test_a_replica_that_comes_counts_from_where_the_others_are():
    survivor = Survivor()
    survivor.active = False
    assert survivor.begin_step() and survivor.run(cut(0)) == "done" and survivor.position == 0
    with pytest.raises(ReplicaLostError):
        survivor.run(cut(1))
    survivor.take_over(7)
    assert survivor.begin_step() and survivor.position == 8
