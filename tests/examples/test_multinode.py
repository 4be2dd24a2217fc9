"""``examples/multinode_torchrun.sh`` and ``examples/multinode_slurm.sh``: two nodes, which are processes here."""

import re

import numpy as np
import pytest
import torch
import yaml
from launching import ROOT, free_port, outputs, slurm_environment, start

CONFIG = ROOT / "configs/gpt_160m_multinode.yaml"
TORCHRUN_SCRIPT, SLURM_SCRIPT = ROOT / "examples/multinode_torchrun.sh", ROOT / "examples/multinode_slurm.sh"


@pytest.fixture
def small_job(tmp_path):
    """Arguments with which the job takes a few seconds on two CPU cores."""
    tokens = np.random.default_rng(0).integers(0, 512, 3000).astype(np.uint16)
    shards = tmp_path / "tokens"
    shards.mkdir()
    tokens[:2500].tofile(shards / "train.bin")
    tokens[2500:].tofile(shards / "val.bin")

    trainer = yaml.safe_load(CONFIG.read_text())["trainer"]
    trainer["callbacks"][-1]["init_args"].update(dirpath=str(tmp_path / "checkpoints"), every_n_train_steps=3)
    trainer["logger"]["init_args"]["save_dir"] = str(tmp_path)
    files = {"callbacks": trainer["callbacks"], "logger": trainer["logger"]}
    (tmp_path / "files.yaml").write_text(yaml.safe_dump({"trainer": files}))
    return [
        f"--config={tmp_path / 'files.yaml'}", f"--data.folder={shards}", "--data.workers=0",
        "--data.context=32", "--data.batch_size=4", "--model.vocabulary=512", "--model.layers=2", "--model.width=32",
        "--model.heads=2", "--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.max_steps=6",
        "--trainer.val_check_interval=3", "--trainer.limit_val_batches=1", "--trainer.log_every_n_steps=1",
        "--lr_scheduler.warmup_steps=2", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip


def check_small_job(printed, folder):
    """Both nodes' output has one table, of two replicas and six steps; the schedule moved; the checkpoint is there."""
    assert dict(re.findall(r"^ +(replicas|optimizer steps) +(\d+)", printed, flags=re.M)) == {
        "replicas": "2",
        "optimizer steps": "6",
    }
    assert printed.count("Communication of this run") == 1
    assert (folder / "lightning_logs/version_0/metrics.csv").exists()
    saved = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 6
    (schedule,) = saved["lr_schedulers"]
    # One move a step, down to a tenth of the config's rates.
    assert schedule["last_epoch"] == 6
    config = yaml.safe_load(CONFIG.read_text())
    peaks = {config["optimizer"]["init_args"]["lr"], config["groups"]["options"]["adamw"]["lr"]}
    assert {round(10 * rate, 9) for rate in schedule["_last_lr"]} == peaks


def test_two_nodes_with_torchrun(tmp_path, small_job):
    shared = {"NODES": "2", "GPUS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    nodes = [start("bash", TORCHRUN_SCRIPT, *small_job, cwd=tmp_path, **shared, NODE_RANK=str(rank)) for rank in (0, 1)]
    check_small_job("".join(outputs(*nodes)), tmp_path)


def test_two_nodes_with_slurm(tmp_path, small_job):
    # sbatch runs a copy of the script.
    copy = tmp_path / "slurm_script"
    copy.write_bytes(SLURM_SCRIPT.read_bytes())
    job = start("bash", copy, *small_job, cwd=tmp_path, **slurm_environment(tmp_path))
    check_small_job(*outputs(job), tmp_path)


def test_the_slurm_script_requests_the_nodes_and_gpus_of_the_config():
    requested = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", SLURM_SCRIPT.read_text(), flags=re.M))
    trainer = yaml.safe_load(CONFIG.read_text())["trainer"]
    assert int(requested["nodes"]) == trainer["num_nodes"]
    assert int(requested["ntasks-per-node"]) == int(requested["gpus-per-node"]) == trainer["devices"]
