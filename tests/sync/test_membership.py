"""Replicas that are lost and that come while a run trains, and what becomes of the others."""

import signal
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch.distributed as dist
from ahead import ahead
from elastic_run import a_run

from lightning_curvadion import ProcessGroupSync
from lightning_curvadion.sync.membership import Membership

IN_BACKGROUND = {"overlap": 1}
WAITED_FOR = {"lag": 0}


def killed(folder, hook):
    """Two go on where a third is killed."""
    with a_run(folder, steps=150, hook=hook, kill_at={"c": 60}) as run:
        run.add("a", "b", "c")
        return run, run.ends("a", "b")


def comes(folder):
    """A third comes to two that train."""
    with a_run(folder, steps=10**6, until=3, hook=IN_BACKGROUND) as run:
        run.add("a", "b")
        run.wait_until(lambda: run.step("a") >= 20)
        run.add("c")
        return run, run.ends("a", "b", "c")


def stands_still(folder):
    """One is stopped, and goes on when the others have gone on without it."""
    with a_run(folder, steps=10**6, until=3, hook=IN_BACKGROUND, timeout=3) as run:
        run.add("a", "b", "c")
        run.wait_until(lambda: all(run.step(name) >= 30 for name in "abc"))
        run.processes["c"].send_signal(signal.SIGSTOP)
        run.wait_until(lambda: all(run.size(name) == 2 and run.step(name) >= 100 for name in "ab"))
        run.processes["c"].send_signal(signal.SIGCONT)
        return run, run.ends("a", "b", "c")


def too_few(folder):
    """One is left where there must be two, and another model's replica comes before."""
    with a_run(folder, steps=10**6, join_timeout=15) as run:
        run.add("a", "b")
        run.wait_until(lambda: run.step("a") >= 10)
        run.options["layers"] = 3
        run.add("c")
        run.wait_until(lambda: run.processes["c"].poll() is not None)
        step = run.step("a")
        run.wait_until(lambda: run.step("a") > step)
        run.processes["b"].kill()
        run.wait_until(lambda: run.processes["a"].poll() is not None)
        return run, []


SCENARIOS = {
    "killed": partial(killed, hook=IN_BACKGROUND),
    "killed, waited for": partial(killed, hook=WAITED_FOR),
    "comes": comes,
    "stands still": stands_still,
    "too few": too_few,
}


@ahead
def scenarios(folder):
    """All at once, since their replicas wait for each other most of the time."""
    for name in SCENARIOS:
        (folder / name).mkdir()
    with ThreadPoolExecutor(len(SCENARIOS)) as threads:
        return {name: threads.submit(run, folder / name) for name, run in SCENARIOS.items()}


def is_one_model(ends, size):
    assert len({(end["digest"], end["end"]) for end in ends}) == 1
    assert all(end["size"] == size for end in ends)
    # Uniform over the tokens is 2.4.
    assert ends[0]["loss"] < 0.5


@pytest.mark.parametrize("name", ["killed", "killed, waited for"])
def test_the_others_train_on_where_one_is_killed(scenarios, name):
    run, ends = scenarios[name].result()
    is_one_model(ends, size=2)
    assert run.processes["c"].wait() == -signal.SIGKILL
    for name in ("a", "b"):
        joined = [line for line in run.lines(name) if "why" in line]
        assert [line["why"] for line in joined] == ["start", "loss"]
        assert [line["size"] for line in joined] == [3, 2]
        # With a lag they notice it a step later.
        assert 59 <= joined[1]["step"] <= 61
        assert joined[1]["seconds"] < 15


def test_a_replica_that_comes_takes_over_the_run(scenarios):
    run, ends = scenarios["comes"].result()
    is_one_model(ends, size=3)
    steps = [next(line["step"] for line in run.lines(name) if line.get("size") == 3) for name in "abc"]
    assert len(set(steps)) == 1 and steps[0] >= 20
    assert [line["why"] for line in run.lines("a") if "why" in line] == ["start", "join"]


def test_one_that_stood_still_while_others_went_on_takes_over_the_run(scenarios):
    run, ends = scenarios["stands still"].result()
    is_one_model(ends, size=3)
    (came_back,) = [line for line in run.lines("c") if line.get("why") == "loss"]
    assert came_back["step"] >= 100


def test_a_replica_of_another_model_is_refused_and_fewer_than_the_fewest_end_with_an_error(scenarios):
    run, _ = scenarios["too few"].result()
    assert run.processes["c"].wait() == 1 and "ValueError" in run.text("c"), run.text("c")[-2000:]
    assert run.processes["a"].wait() == 1 and "RendezvousTimeoutError" in run.text("a"), run.text("a")[-2000:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("29400",), 'endpoint must be "host:port"'),
        (("localhost:port",), 'endpoint must be "host:port"'),
        (("localhost:1", 0), "min_replicas must be from 1"),
        (("localhost:1", 3, 2), "min_replicas must be from 1 to max_replicas=2"),
    ],
)
def test_a_bad_argument_is_one_clear_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        Membership(*arguments)


def regroup_of_several(rank, world):
    inner = dist.new_group([rank], use_local_synchronization=True)
    sync = ProcessGroupSync(dist.group.WORLD, inner_group=inner)
    with pytest.raises(ValueError, match="regroup replicas of one process"):
        sync.regroup(1)


def test_replicas_of_several_processes_are_refused(replicas):
    replicas.run(2, regroup_of_several)
