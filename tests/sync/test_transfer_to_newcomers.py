"""A replica that comes receives the model beside the others' training, and what becomes of it where one is lost."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from ahead import ahead
from elastic_run import a_run

# Of half a million numbers and as many of the optimizer's state.
LARGE = {"width": 256, "layers": 2, "seconds_a_megabyte": 1.5, "sleep": 0.05}
SLOW = {"width": 128, "layers": 1, "seconds_a_megabyte": 3, "sleep": 0.2}


@pytest.mark.alone
def test_the_others_train_while_a_newcomer_receives_the_model(tmp_path):
    with a_run(tmp_path, steps=10**6, until=3, timeout=20, **LARGE) as run:
        run.add("a", "b")
        run.wait_until(lambda: run.step("a") >= 20)
        run.add("c")
        ends = run.ends("a", "b", "c", within=150)
    assert len({(end["digest"], end["end"]) for end in ends}) == 1
    (caught_up,) = [line for line in run.lines("c") if "caught up" in line]
    assert caught_up["caught up"] and caught_up["seconds"] > 4
    joined = [line for name in "abc" for line in run.lines(name) if line.get("why") == "join" or line.get("size") == 3]
    model = 4 * 500_000
    assert all(line.get("sent", 0) < model / 1000 for line in joined)
    before = [line for name in "ab" for line in run.lines(name) if "longest" in line and line["size"] == 2]
    print(caught_up, max(line["longest"] for line in before), [line.get("sent") for line in joined])
    assert len(before) > 5
    assert max(line["longest"] for line in before) < caught_up["seconds"] / 3


@contextmanager
def a_transfer(folder):
    """Three train, and one of them sends to a fourth: the run, and which one it is."""
    with a_run(folder, steps=10**6, until=3, timeout=10, **SLOW) as run:
        run.add("a", "b", "d")
        run.wait_until(lambda: run.step("a") >= 10)
        run.add("c")
        run.wait_until(lambda: any('"sends"' in run.text(name) for name in "abd"))
        yield run, next(name for name in "abd" if '"sends"' in run.text(name))


def sender_lost(folder):
    """Rank 0 is killed while it sends: the next one serves the newcomer, which asks again."""
    with a_transfer(folder) as (run, sender):
        run.processes[sender].kill()
        return run, run.ends(*{"a", "b", "c", "d"} - {sender})


def newcomer_lost(folder):
    """The newcomer is killed while it receives, another one comes, and one is lost."""
    with a_transfer(folder) as (run, _):
        run.processes["c"].kill()
        step = run.step("a")
        run.wait_until(lambda: run.step("a") >= step + 10)
        run.add("e")
        run.processes["d"].kill()
        return run, run.ends("a", "b", "e")


def too_few(folder):
    """One of two is killed, and a newcomer finds one that waits."""
    with a_run(folder, steps=10**6, until=2, timeout=10) as run:
        run.add("a", "b")
        run.wait_until(lambda: run.step("a") >= 20)
        run.processes["b"].kill()
        run.add("c")
        return run, run.ends("a", "c")


SCENARIOS = (sender_lost, newcomer_lost, too_few)


@ahead
def scenarios(folder):
    """All at once, since their replicas wait for each other most of the time."""
    for scenario in SCENARIOS:
        (folder / scenario.__name__).mkdir()
    with ThreadPoolExecutor(len(SCENARIOS)) as threads:
        return {scenario: threads.submit(scenario, folder / scenario.__name__) for scenario in SCENARIOS}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_where_one_is_lost_in_a_transfer_the_others_train_on(scenarios, scenario):
    _, ends = scenarios[scenario].result()
    assert len({(end["digest"], end["end"]) for end in ends}) == 1


def test_a_newcomer_asks_again_where_its_sender_is_lost(scenarios):
    run, _ = scenarios[sender_lost].result()
    assert [line["caught up"] for line in run.lines("c") if "caught up" in line] == [True]


def test_a_replica_for_which_too_few_wait_joins_at_once(scenarios):
    run, _ = scenarios[too_few].result()
    (caught_up,) = [line for line in run.lines("c") if "caught up" in line]
    assert not caught_up["caught up"] and caught_up["seconds"] < 25
