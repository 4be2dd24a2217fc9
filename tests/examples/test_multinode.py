"""``examples/multinode_torchrun.sh`` and ``examples/multinode_slurm.sh``: two nodes, which are processes here."""

import re

import numpy as np
import torch
import yaml
from ahead import ahead
from launching import ROOT, free_port, outputs, slurm_environment, start

CONFIG = ROOT / "configs/gpt_160m_multinode.yaml"
TORCHRUN_SCRIPT, SLURM_SCRIPT = ROOT / "examples/multinode_torchrun.sh", ROOT / "examples/multinode_slurm.sh"


def small_job(folder):
    """Arguments with which the job takes a few seconds on two CPU cores."""
    tokens = np.random.default_rng(0).integers(0, 512, 3000).astype(np.uint16)
    shards = folder / "tokens"
    shards.mkdir()
    tokens[:2500].tofile(shards / "train.bin")
    tokens[2500:].tofile(shards / "val.bin")

    trainer = yaml.safe_load(CONFIG.read_text())["trainer"]
    trainer["callbacks"][-1]["init_args"].update(dirpath=str(folder / "checkpoints"), every_n_train_steps=3)
    trainer["logger"]["init_args"]["save_dir"] = str(folder)
    files = {"callbacks": trainer["callbacks"], "logger": trainer["logger"]}
    (folder / "files.yaml").write_text(yaml.safe_dump({"trainer": files}))
    return [
        f"--config={folder / 'files.yaml'}", f"--data.folder={shards}", "--data.workers=0",
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


@ahead
def of_torchrun(folder):
    """What two nodes print, and the folder in which they train."""
    shared = {"NODES": "2", "GPUS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    job = ["bash", TORCHRUN_SCRIPT, *small_job(folder)]
    nodes = [start(*job, cwd=folder, **shared, NODE_RANK=str(rank)) for rank in (0, 1)]
    return "".join(outputs(*nodes)), folder


def test_two_nodes_with_torchrun(of_torchrun):
    check_small_job(*of_torchrun)


@ahead
def of_slurm(folder):
    # sbatch runs a copy of the script.
    copy = folder / "slurm_script"
    copy.write_bytes(SLURM_SCRIPT.read_bytes())
    (printed,) = outputs(start("bash", copy, *small_job(folder), cwd=folder, **slurm_environment(folder)))
    return printed, folder


def test_two_nodes_with_slurm(of_slurm):
    check_small_job(*of_slurm)


def test_the_slurm_script_requests_the_nodes_and_gpus_of_the_config():
    requested = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", SLURM_SCRIPT.read_text(), flags=re.M))
    trainer = yaml.safe_load(CONFIG.read_text())["trainer"]
    assert int(requested["nodes"]) == trainer["num_nodes"]
    assert int(requested["ntasks-per-node"]) == int(requested["gpus-per-node"]) == trainer["devices"]
