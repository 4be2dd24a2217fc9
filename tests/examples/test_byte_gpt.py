"""``examples/byte_gpt.py`` through ``configs/byte_gpt.yaml``: the first command of the README, shortened."""

import re
import sys

import pytest
from ahead import ahead
from launching import outputs, start


@ahead
def main_job(folder):
    """What it prints."""
    (printed,) = outputs(
        start(
            sys.executable, "-m", "lightning_curvadion", "fit", "--config", "configs/byte_gpt.yaml",
            "--trainer.max_steps=12", "--trainer.val_check_interval=6", f"--data.cache={folder / 'data'}",
            "--data.val_sequences=64", f"--trainer.logger.init_args.save_dir={folder}",
        )
    )  # fmt: skip
    return printed


def test_the_main_job_trains_and_ends_with_its_table(main_job):
    table = dict(re.findall(r"^  (\S.*?)  +(\S.*)$", main_job.partition("Communication of this run")[2], flags=re.M))
    assert float(table["val_bits_per_byte"]) == pytest.approx(float(table["val_loss"]) / 0.6931, rel=1e-3)
    assert float(table["val_loss"]) < 5.6
    assert table["optimizer steps"] == "12" and table["replicas"] == "2"
    assert float(table["share of DDP"].split()[0]) > 0
    assert {"sent per replica", "DDP would have sent"} <= set(table)
