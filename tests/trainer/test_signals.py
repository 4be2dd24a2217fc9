"""A signal on one rank takes effect on all ranks after the same step. ``python tests/breaking.py signals`` has more."""

import breaking
import pytest


@pytest.mark.parametrize("victim", [0, 1])
def test_sigterm_on_one_rank_stops_all_ranks_after_the_same_step_with_their_consensus_saved(tmp_path, victim):
    assert breaking.terminate(tmp_path, victim) < 30


def test_a_slurm_requeue_on_one_rank_saves_the_consensus_of_all_ranks(tmp_path):
    breaking.requeue(tmp_path)


@pytest.mark.parametrize("what", ["requeue, term", "term, requeue"])
def test_a_requeue_and_a_stop_before_one_agreement_both_take_effect(tmp_path, what):
    breaking.requeue_and_stop(tmp_path, what)


def test_an_interrupted_run_ends_with_a_checkpoint(tmp_path):
    assert breaking.interrupt(tmp_path) < 30
