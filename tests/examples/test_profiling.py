"""``examples/profiling.py``: a trace of two replicas."""

import json
import re
import sys
from unittest import mock

import pytest
from launching import ROOT, free_port, run_as_torchrun

pytestmark = pytest.mark.alone


def record(rank, world, folder, port, *delays):
    with mock.patch.object(sys, "argv", ["profiling.py", "--folder", str(folder), *delays]):
        return run_as_torchrun(rank, world, ROOT / "examples/profiling.py", port)


def test_the_trace_of_each_rank_shows_computation_and_collectives_side_by_side(replicas, tmp_path):
    printed, other = replicas.run(2, record, tmp_path, free_port(), "--lag", "0")
    assert other == "", "rank 0 alone prints"
    for rank in range(2):
        events = json.loads((tmp_path / f"rank{rank}.json").read_text())["traceEvents"]
        threads = {event["name"]: event["tid"] for event in events if "dur" in event}
        ours = {name for name in threads if name.startswith("curvadion::")}
        assert ours >= {f"curvadion::{name}" for name in ("rmmc", "agreement", "local_step", "sync_step", "collective")}
        assert threads["gloo:all_reduce"] != threads["curvadion::agreement"] == threads["forward"]
    rows = re.findall(r"^( *\S[\w ]*?) +(\d+\.\d+) +(\d+\.\d+)%$", printed, re.MULTILINE)
    share = {phase: float(percent) for phase, _, percent in rows}
    whole = ("forward", "backward", "RMMC", "agreement", "local step", "sync step")
    assert share.keys() == {*whole, "  quantize", "  collective", "  dequantize"}
    assert all(share[phase] > 0 for phase in share) and 30 < sum(share[phase] for phase in whole) <= 100.1
    taken, beside = map(float, re.search(r"took (\S+)% of the time; (\S+)% beside computation", printed).groups())
    # Nothing of them is hidden where the replicas wait for each other at once.
    assert 0 < taken < 50 and beside <= taken


def test_with_overlap_the_mean_of_a_sync_step_lies_beside_the_computation_of_the_next_steps(replicas, tmp_path):
    printed, _ = replicas.run(2, record, tmp_path, free_port(), "--overlap", "2")
    events = json.loads((tmp_path / "rank0.json").read_text())["traceEvents"]
    starts = {
        name: [e["ts"] for e in events if e.get("name") == name] for name in ("curvadion::send", "curvadion::merge")
    }
    forward = [event["ts"] for event in events if event.get("name") == "forward" and "dur" in event]
    sent = min(starts["curvadion::send"])
    merged = min(time for time in starts["curvadion::merge"] if time > sent)
    assert sum(sent < time < merged for time in forward) == 2
    assert re.search(r"^send .*\nmerge ", printed, re.MULTILINE)
