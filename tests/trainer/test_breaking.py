"""What becomes of a run that fails. ``python tests/breaking.py`` breaks more of them, at length."""

import breaking
import pytest
import torch


@pytest.mark.parametrize(
    ("world", "where", "delays"),
    [
        (2, "forward", (0, 0)),
        (3, "sync", (0, 0)),
        (2, "agreement", (0, 0)),
        (2, "agreement", (2, 5)),
        (3, "sync", (1, 1)),
    ],
)
def test_survivors_of_a_kill_end_with_an_error_that_names_the_loss(tmp_path, world, where, delays):
    assert breaking.kill_once(tmp_path, world, victim=world - 1, step=5, where=where, delays=delays) < 30


@pytest.mark.parametrize("sharded", [False, True])
def test_a_killed_process_ends_its_replica_and_the_others_say_so(tmp_path, sharded):
    assert breaking.kill_in_replica(tmp_path, victim=3, sharded=sharded) < 30


@pytest.mark.parametrize(("victim", "sharded"), [(1, False), (2, False), (2, True)])
def test_sigterm_on_a_process_of_a_replica_stops_all_after_one_step(tmp_path, victim, sharded):
    assert breaking.terminate(tmp_path, victim, world=4, delays=(1, 1), replica_size=2, sharded=sharded) < 30


@pytest.mark.parametrize("sharded", [False, True])
def test_an_exception_in_a_replica_reaches_the_user_from_the_process_that_had_it(tmp_path, sharded):
    assert breaking.exception_in_replica(tmp_path, victim=3, sharded=sharded) < 30


def test_torchrun_restarts_a_killed_run_from_its_newest_checkpoint(tmp_path):
    breaking.restart(tmp_path)


def test_a_stalled_rank_ends_the_others_after_the_timeout(tmp_path):
    assert breaking.stall(tmp_path, timeout=3.0) < 28


def test_an_exception_reaches_the_user_from_the_rank_that_had_it(tmp_path):
    assert breaking.exception(tmp_path) < 30


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("what", ["kill", "stop"])
def test_on_gpus_a_lost_or_stalled_rank_ends_the_other_after_the_timeout(tmp_path, what):
    assert breaking.lose_on_gpus(tmp_path, what) < 110


def test_memory_stays_flat_and_no_file_stays_open(tmp_path):
    growth, opened = breaking.memory(tmp_path, steps=300, settled=150)
    assert growth < 5 and opened <= 0
