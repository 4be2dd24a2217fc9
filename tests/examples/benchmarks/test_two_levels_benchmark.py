"""``examples/benchmarks/two_levels.py``: what its table says of finished runs. Running it takes minutes."""

import csv

from examples.benchmarks.two_levels import KEY, LAYOUTS, Job, table


def test_the_table_has_the_mean_of_the_seeds_of_each_layout(tmp_path):
    jobs = [Job(layout, 100, "", 0, seed) for layout in LAYOUTS for seed in (0, 1)]
    results = tmp_path / "results.csv"
    with results.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*KEY, "loss", "sync_steps", "payload", "kernel", "seconds"])
        for job in jobs:
            writer.writerow([*job.key, 1.0 + job.seed / 10, 30, 900_000, 1_000_000, 20.0])
    lines = table(jobs, results).splitlines()[2:]
    assert lines == [f"| {layout} | 1.0500 | 0.0707 | 30 | 1.00 | 5.0 |" for layout in LAYOUTS]
