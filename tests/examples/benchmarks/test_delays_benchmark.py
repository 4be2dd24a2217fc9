"""``examples/benchmarks/delays.py --smoke``."""

from ahead import ahead
from training import smoke_run

from examples.benchmarks import delays


@ahead
def delays_smoke(folder):
    return smoke_run("delays.py", folder)


def test_the_smoke_run_prints_each_way_beside_no_communication(delays_smoke):
    rows = [line.split(" | ") for line in delays_smoke.splitlines() if line.startswith("| 131k")]
    assert [row[3] for row in rows] == [delays.DDP, delays.ALONE, "ours: lag 1, overlap 0", "ours: lag 1, overlap 1"]
    ddp, alone, *_ = rows
    assert (ddp[9], alone[9]) == ("100 % |", "0 % |") and alone[5] == "100 %"
    assert all(float(row[4]) > 0 and float(row[7]) > 0 for row in rows)
