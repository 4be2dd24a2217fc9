"""The main job under DDP and under each kind of synchronisation: validation loss beside bytes sent, as a table.

    python examples/benchmarks/variants.py            # two CPU replicas, 600 steps each: about ten minutes
    python examples/benchmarks/variants.py --smoke    # the first two rows, a few steps

One seed, one small model: a look at the options, not a comparison of methods.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CLASS = ["--trainer.strategy.class_path=lightning_curvadion.CurvaDionStrategy"]

VARIANTS = {
    "DDP with Dion": ["--trainer.strategy=ddp"],
    "curvadion, defaults": [],
    "wire_format=int2": ["wire_format=int2"],
    "momentum=average, wire_format=int2": ["momentum=average", "wire_format=int2"],
    "consensus=none": ["consensus=none"],
}


def run(options: list[str], extra: list[str]) -> dict[str, str]:
    """Train once in processes of its own; the table that the run ends with."""
    flags = [option if option.startswith("--") else f"--trainer.strategy.init_args.{option}" for option in options]
    if any(flag.startswith("--trainer.strategy.init_args") for flag in flags):
        flags = CLASS + flags
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lightning_curvadion", "fit", "--config", "configs/byte_gpt.yaml"]
        command += ["--trainer.enable_progress_bar=false", f"--trainer.logger.init_args.save_dir={folder}"]
        done = subprocess.run([*command, *flags, *extra], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-4000:])
    table = done.stdout.partition("Communication of this run")[2]
    return dict(re.findall(r"^  (\S.*?)  +(\S.*)$", table, flags=re.M))


def main() -> None:
    """Print one row a variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two rows of six steps, to see that it runs")
    smoke = parser.parse_args().smoke
    extra = ["--trainer.max_steps=6", "--trainer.val_check_interval=6", "--data.val_sequences=64"] if smoke else []
    print("| setting | validation loss | sync steps | sent, share of DDP |\n| --- | --- | --- | --- |", flush=True)
    for name, options in list(VARIANTS.items())[: 2 if smoke else None]:
        table = run(options, extra)
        share = table["ratio"].removesuffix(" of DDP")
        print(f"| {name} | {table['val_loss']} | {table['sync steps']} | {share} |", flush=True)


if __name__ == "__main__":
    main()
