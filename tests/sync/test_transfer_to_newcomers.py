"""A replica that comes receives the model beside the others' training, and what becomes of it where one is lost."""

import pytest
from elastic_run import a_run

# Of 2 million numbers, at 2 MB a second.
LARGE = {"width": 512, "layers": 2, "seconds_a_megabyte": 0.5, "sleep": 0.05}


@pytest.mark.alone
def test_the_others_train_while_a_newcomer_receives_the_model(tmp_path):
    with a_run(tmp_path, steps=10**6, until=3, timeout=20, **LARGE) as run:
        run.add("a", "b")
        run.wait_until(lambda: run.step("a") >= 20)
        run.add("c")
        ends = run.ends("a", "b", "c", within=150)
    assert len({(end["digest"], end["end"]) for end in ends}) == 1
    (caught_up,) = [line for line in run.lines("c") if "caught up" in line]
    assert caught_up["caught up"] and caught_up["seconds"] > 10
    joined = [line for name in "abc" for line in run.lines(name) if line.get("why") == "join" or line.get("size") == 3]
    model = 4 * 2_000_000
    assert all(line.get("sent", 0) < model / 1000 for line in joined)
    before = [line for name in "ab" for line in run.lines(name) if "longest" in line and line["size"] == 2]
    print(caught_up, max(line["longest"] for line in before), [line.get("sent") for line in joined])
    assert len(before) > 5
    assert max(line["longest"] for line in before) < caught_up["seconds"] / 3


@pytest.mark.parametrize("name", ["a", "c"])
def test_where_one_of_the_two_is_lost_the_others_train_on(tmp_path, name):
    slow = {"width": 128, "layers": 1, "seconds_a_megabyte": 3, "sleep": 0.2}
    with a_run(tmp_path, steps=10**6, until=3, timeout=10, **slow) as run:
        run.add("a", "b", "d")
        run.wait_until(lambda: run.step("a") >= 10)
        run.add("c")
        run.wait_until(lambda: '"sends"' in run.text("a"))
        run.processes[name].kill()
        if name == "a":
            # The next rank 0 serves the newcomer, which asks again.
            ends = run.ends("b", "c", "d")
            assert [line["caught up"] for line in run.lines("c") if "caught up" in line] == [True]
        else:
            step = run.step("a")
            run.wait_until(lambda: run.step("a") >= step + 10)
            run.add("e")
            run.processes["d"].kill()
            ends = run.ends("a", "b", "e")
        assert len({(end["digest"], end["end"]) for end in ends}) == 1


def test_a_replica_for_which_too_few_wait_joins_at_once(tmp_path):
    with a_run(tmp_path, steps=10**6, until=2, timeout=10) as run:
        run.add("a", "b")
        run.wait_until(lambda: run.step("a") >= 20)
        run.processes["b"].kill()
        run.add("c")
        ends = run.ends("a", "c")
        assert len({(end["digest"], end["end"]) for end in ends}) == 1
        (caught_up,) = [line for line in run.lines("c") if "caught up" in line]
        assert not caught_up["caught up"] and caught_up["seconds"] < 20
