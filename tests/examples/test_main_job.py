"""The commands of the README, shortened; each in processes of its own, as a user would run them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*words, timeout=200):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_the_main_job_trains_and_ends_with_its_table(tmp_path):
    shown = run(
        "-m", "lightning_curvadion", "fit", "--config", "configs/byte_gpt.yaml",
        "--trainer.max_steps=12", "--trainer.val_check_interval=6", f"--data.cache={tmp_path / 'data'}",
        "--data.val_sequences=64", f"--trainer.logger.init_args.save_dir={tmp_path}",
    )  # fmt: skip
    table = dict(re.findall(r"^  (\S.*?)  +(\S.*)$", shown.partition("Communication of this run")[2], flags=re.M))
    assert float(table["val_bits_per_byte"]) == pytest.approx(float(table["val_loss"]) / 0.6931, rel=1e-3)
    assert float(table["val_loss"]) < 5.6
    assert table["optimizer steps"] == "12" and table["replicas"] == "2"
    assert float(table["ratio"].split()[0]) > 0
    assert {"sent per replica", "DDP would have sent"} <= set(table)


def test_the_benchmark_of_step_times_runs():
    shown = run("examples/benchmarks/step_time.py", "--smoke")
    for line in ("AdamW", "CurvaDion, local step", "CurvaDion, sync step", "Muon", "RMMC takes", "state of CurvaDion"):
        assert line in shown


def test_the_benchmark_of_the_wire_formats_runs():
    shown = run("examples/benchmarks/wire.py", "--smoke")
    for line in ("| int2 |", "between two replicas", "A sync step, seconds", "Relative error", "gated 3, seed 0"):
        assert line in shown


def test_the_plain_loop_trains_without_lightning():
    shown = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "examples/plain_loop.py")
    first, last, synced = re.search(r"loss (\S+) -> (\S+), (\d+) sync steps", shown).groups()
    assert float(last) < 0.6 * float(first) and 1 < int(synced) < 200
