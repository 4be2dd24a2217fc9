"""The examples, each run as its first lines say, in processes of its own."""

import difflib
import doctest
import importlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from breaking import free_port
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from models import build, parameters_of
from replicas import counted_collectives
from torch import nn
from training import Member, same, trainer_for

from examples.fabric import Unwrapped
from examples.token_shards import HEADER, MAGIC, TokenShards, TokenWindows
from lightning_curvadion import CurvaDion, EveryNSteps, ProcessGroupSync, split_parameters

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def environment(**more):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PATH": path, **more}


def start(*words, cwd=ROOT, **more):
    return subprocess.Popen(
        [str(word) for word in words],
        cwd=cwd,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def outputs(*processes, timeout=120):
    """What they print, once all have ended well."""
    try:
        printed = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, printed, strict=True):
        assert process.returncode == 0, text[-4000:]
    return printed


# -- without a launcher -----------------------------------------------------------------------------------------------


def test_the_index_names_every_example_and_config():
    index = (EXAMPLES / "README.md").read_text()
    files = [path for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh") and path.name != "__init__.py"]
    for path in [*files, *(ROOT / "configs").glob("*.yaml")]:
        assert path.name in index, f"{path.name} is missing in examples/README.md"
    for named in re.findall(r"(?:examples|configs)/[\w./]+\.\w+", index):
        assert (ROOT / named).exists(), f"examples/README.md names {named}"


@pytest.mark.parametrize("name", ["digits_vit", "gpt", "hf_finetune", "token_shards"])
def test_what_the_docstrings_show_is_so(name):
    if requirement := {"digits_vit": "sklearn", "hf_finetune": "transformers"}.get(name):
        pytest.importorskip(requirement)
    failed, tried = doctest.testmod(importlib.import_module(f"examples.{name}"))
    assert tried > 0 and failed == 0


@pytest.mark.parametrize(("name", "package"), [("digits_vit", "sklearn.datasets"), ("hf_finetune", "transformers")])
def test_a_missing_package_is_named(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"examples.{name}", raising=False)
    with pytest.raises(ImportError, match=rf"examples/{name}.py needs .*: pip install"):
        importlib.import_module(f"examples.{name}")


def test_the_switch_is_three_lines():
    before, after = ((EXAMPLES / f"switch_{name}.py").read_text().splitlines() for name in ("before", "after"))
    changes = [line for line in difflib.ndiff(before, after) if line[0] in "+-" and line[2:].strip()]
    assert "lightning_curvadion" not in "\n".join(before)
    assert len([line for line in changes if line[0] == "+"]) == 3, changes
    assert len([line for line in changes if line[0] == "-"]) == 2, "the import is new, two lines are replaced"


# -- Fabric -----------------------------------------------------------------------------------------------------------


def step_under_fabric(rank, world):
    """Gradients and parameters after a local step, its collectives, and the parameters after a consensus."""
    fabric = Fabric(accelerator="cpu", devices=world, strategy=Unwrapped(), plugins=[Member(rank, world)])
    fabric.launch()
    net, _ = build()
    curvadion = CurvaDion(split_parameters(net), lr=0.02, trigger=EveryNSteps(3))
    model, optimizer = fabric.setup(net, curvadion)
    sync = ProcessGroupSync()
    with pytest.raises(ValueError, match=r"on the CurvaDion that you gave to fabric\.setup"):
        optimizer.register_sync_hook(sync)
    curvadion.register_sync_hook(sync)
    sync.include_module(net)
    tokens = torch.randint(0, 11, (24,), generator=torch.Generator().manual_seed(rank))
    with counted_collectives() as calls:
        fabric.backward(nn.functional.cross_entropy(model(tokens), tokens))
        optimizer.step()
    assert curvadion.last_step is not None and not curvadion.last_step.synced
    gradients = [parameter.grad.clone() for parameter in net.parameters()]
    local = parameters_of(net)
    sync.reach_consensus(curvadion, include_state=True)
    return list(calls), gradients, local, parameters_of(net)


def test_a_local_step_under_fabric_stays_on_its_replica(replicas):
    (calls, gradients, local, met), (_, other_gradients, other_local, other_met) = replicas.run(2, step_under_fabric)
    assert calls == [("all_reduce", 16)]
    for ours, theirs in ((gradients, other_gradients), (local, other_local)):
        assert not any(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert same(met, other_met)


def test_fabric():
    (printed,) = outputs(start(sys.executable, "examples/fabric.py"))
    first, last, synced, steps = re.search(r"loss (\S+) -> (\S+), (\d+) sync steps of (\d+)", printed).groups()
    assert float(last) < 0.5 * float(first) and 1 < int(synced) < int(steps)
    apart, together = re.search(r": (\S+) apart after a local step, (\S+) after the consensus", printed).groups()
    assert float(apart) > 0 and float(together) == 0


# -- Lightning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "strategy"), [("switch_before", "ddp"), ("switch_after", "curvadion")])
def test_before_and_after_the_switch(tmp_path, monkeypatch, capfd, name, strategy):
    # With replicas forked from here, since importing torch takes longer than the script; nothing else is replaced.
    script = (EXAMPLES / f"{name}.py").read_text()
    assert script.count(f'strategy="{strategy}"') == 1
    (tmp_path / "script.py").write_text(script.replace(f'"{strategy}"', f'"{strategy}_fork"'))
    monkeypatch.chdir(tmp_path)
    # Lightning tells its children where to meet, and leaves it behind.
    monkeypatch.setattr(os, "environ", os.environ.copy())
    runpy.run_path("script.py", run_name="__main__")
    (accuracy,) = re.findall(r"accuracy on data it has not seen: (\S+)", capfd.readouterr().out)
    assert float(accuracy) > 0.6, "a tenth would be chance"


def test_resuming():
    (printed,) = outputs(start(sys.executable, "examples/resuming.py"))
    assert "terminated with signal SIGKILL" in printed
    assert "the parameters of the undisturbed run, bit for bit: True" in printed
    (whole, left, resumed, alone) = map(int, re.findall(r"(\d+) steps", printed))
    assert 0 < left < whole == resumed < alone, "one replica has twice the steps to an epoch"


# -- several nodes ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_job(tmp_path):
    """Arguments that make a few seconds on two CPU cores of the job of several nodes."""
    tokens = np.random.default_rng(0).integers(0, 512, 3000)
    shards = tmp_path / "tokens"
    shards.mkdir()
    tokens[:2000].astype(np.uint16).tofile(shards / "train_0.bin")
    np.save(shards / "train_1.npy", tokens[2000:2500])
    header = np.zeros(256, np.int32)
    header[:3] = MAGIC, 1, 500
    (shards / "val_0.bin").write_bytes(header.tobytes() + tokens[2500:].astype(np.uint16).tobytes())

    trainer = yaml.safe_load((ROOT / "configs/gpt_160m_multinode.yaml").read_text())["trainer"]
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
    """Of both nodes' output: one table, of two replicas and six steps; the schedule moved; the checkpoint is there."""
    assert dict(re.findall(r"^ +(replicas|optimizer steps) +(\d+)", printed, flags=re.M)) == {
        "replicas": "2",
        "optimizer steps": "6",
    }
    assert printed.count("Communication of this run") == 1
    assert (folder / "lightning_logs/version_0/metrics.csv").exists()
    saved = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 6
    (schedule,) = saved["lr_schedulers"]
    # One move a step, down to a tenth of what the config says.
    assert schedule["last_epoch"] == 6
    peaks = yaml.safe_load((ROOT / "configs/gpt_160m_multinode.yaml").read_text())
    wanted = {peaks["optimizer"]["init_args"]["lr"], peaks["groups"]["options"]["adamw"]["lr"]}
    assert {round(10 * rate, 9) for rate in schedule["_last_lr"]} == wanted


def test_two_nodes_with_torchrun(tmp_path, small_job):
    shared = {"NODES": "2", "GPUS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    script = EXAMPLES / "multinode_torchrun.sh"
    nodes = [start("bash", script, *small_job, cwd=tmp_path, **shared, NODE_RANK=str(rank)) for rank in (0, 1)]
    check_small_job("".join(outputs(*nodes)), tmp_path)


SRUN = """#!/usr/bin/env bash
# Two nodes with a task each, as srun would start them.
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_NODEID=$rank SLURM_LOCALID=0 "$@" &
    tasks[rank]=$!
done
wait "${tasks[0]}" && wait "${tasks[1]}"
"""


def test_two_nodes_with_slurm(tmp_path, small_job):
    srun = tmp_path / "bin/srun"
    srun.parent.mkdir()
    srun.write_text(SRUN)
    srun.chmod(0o755)
    told = {"JOB_ID": "7", "JOB_NAME": "train", "NNODES": "2", "NTASKS": "2", "NTASKS_PER_NODE": "1"}
    told |= {"NODELIST": "127.0.0.1", "SUBMIT_DIR": str(ROOT), "CPUS_PER_TASK": "1"}
    slurm = {f"SLURM_{name}": value for name, value in told.items()}
    paths = os.pathsep.join([str(srun.parent), environment()["PATH"]])
    # sbatch runs a copy of the script.
    copy = tmp_path / "slurm_script"
    copy.write_bytes((EXAMPLES / "multinode_slurm.sh").read_bytes())
    job = start("bash", copy, *small_job, cwd=tmp_path, **slurm, PATH=paths, MASTER_PORT=str(free_port()))
    check_small_job(*outputs(job), tmp_path)


def test_the_slurm_script_asks_for_what_the_config_uses():
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", (EXAMPLES / "multinode_slurm.sh").read_text(), flags=re.M))
    trainer = yaml.safe_load((ROOT / "configs/gpt_160m_multinode.yaml").read_text())["trainer"]
    assert int(asked["nodes"]) == trainer["num_nodes"]
    assert int(asked["ntasks-per-node"]) == int(asked["gpus-per-node"]) == trainer["devices"]


# -- token shards -----------------------------------------------------------------------------------------------------


def test_every_kind_of_shard_gives_the_same_windows(tmp_path):
    tokens = np.arange(40, dtype=np.uint16)
    tokens.tofile(tmp_path / "plain.bin")
    np.save(tmp_path / "array.npy", tokens.astype(np.int32))
    header = np.zeros(256, np.int32)
    header[:3] = MAGIC, 1, 40
    (tmp_path / "header.bin").write_bytes(header.tobytes() + tokens.tobytes())
    wanted = [list(range(start, start + 9)) for start in range(0, 32, 8)]
    for name in ("plain.bin", "array.npy", "header.bin"):
        assert [window.tolist() for window in TokenWindows([tmp_path / name], length=8)] == wanted


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"\0" * 33, "an odd number of bytes, 33,"),
        (np.array([MAGIC, 1, 50] + [0] * 253, np.int32).tobytes() + b"\0" * 40, rf"should be .* {HEADER + 100} bytes"),
        (b"\0" * 10, "none of 1 shards holds 9 tokens"),
    ],
)
def test_bad_shards(tmp_path, contents, message):
    (tmp_path / "train.bin").write_bytes(contents)
    with pytest.raises(ValueError, match=message):
        TokenShards(str(tmp_path), context=8).windows("train")
    with pytest.raises(ValueError, match=r"no shards for val: .* say where they are with --data.folder"):
        TokenShards(str(tmp_path), context=8).windows("val")


class Recorder(pl.LightningModule):
    """Notes its batches."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(64, 2)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.tolist())
        return self.embedding(batch).square().mean()

    def configure_optimizers(self):
        return CurvaDion(split_parameters(self), lr=0.01)


def batches_of(rank, world, folder, resume=None):
    """What a replica trains on in six steps, of which four are an epoch; it saves after three."""
    pl.seed_everything(0, verbose=False)
    module = Recorder()
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)
    trainer = trainer_for(rank, world, max_steps=6, max_epochs=9, callbacks=[saving], enable_checkpointing=True)
    trainer.fit(module, datamodule=TokenShards(folder, context=8, batch_size=2, workers=0), ckpt_path=resume)
    return module.seen


def test_tokens_go_on_where_the_checkpoint_was_written(replicas, tmp_path):
    (np.arange(4 * 2 * 2 * 8 + 1) % 64).astype(np.uint16).tofile(tmp_path / "train.bin")
    whole = replicas.run(2, batches_of, str(tmp_path))
    resumed = replicas.run(2, batches_of, str(tmp_path), str(tmp_path / "step=3.ckpt"))
    for seen, again in zip(whole, resumed, strict=True):
        assert len(seen) == 6 and again == seen[3:]
        assert sorted(seen[:4]) != seen[:4], "they are shuffled"
