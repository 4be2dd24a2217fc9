"""Every way in which Lightning starts replicas, and one replica alone.

torchrun starts them in ``test_breaking.py``. ``tests/examples/test_multinode.py`` has two nodes, with torchrun and with
SLURM.
"""

import re
import sys

import pytest
from launching import outputs, start
from lightning.pytorch.strategies import StrategyRegistry
from training import ROOT, python_path, run_script


def short_script(folder, strategy="curvadion", **trainer):
    """The example of a switched script with a few steps, the monitor and these arguments of the Trainer."""
    code = (ROOT / "examples/switch_after.py").read_text()
    for old, new in (
        ('"curvadion"', f'"{strategy}"'),
        ("import CurvaDion", "import CommunicationMonitor, CurvaDion"),
        ("max_epochs=3", "max_epochs=1, limit_train_batches=8, callbacks=[CommunicationMonitor()]"),
    ):
        assert old in code
        code = code.replace(old, new)
    for name, value in trainer.items():
        code, count = re.subn(rf'\b{name}=["\w]+', f"{name}={value}", code)
        assert count == 1, name
    script = folder / "script.py"
    script.write_text(code)
    return script


def replicas_of(run):
    """Replicas of a finished run: rank 0 alone prints the monitor's table."""
    assert run.returncode == 0, run.stderr[-3000:]
    assert "(CurvaDionStrategy)" in run.stdout
    (replicas,) = re.findall(r"replicas +(\d+)", run.stdout)
    return int(replicas)


@pytest.mark.parametrize("strategy", ["curvadion", "curvadion_spawn", "curvadion_fork"])
def test_lightning_starts_a_process_for_each_device(tmp_path, strategy):
    assert replicas_of(run_script(short_script(tmp_path, strategy), folder=tmp_path)) == 2


def test_a_notebook_forks():
    notebook, fork = (dict(StrategyRegistry[name]) for name in ("curvadion_notebook", "curvadion_fork"))
    assert notebook == {**fork, "strategy_name": "curvadion_notebook"}


def test_one_device_is_one_replica(tmp_path):
    assert replicas_of(run_script(short_script(tmp_path, devices=1), folder=tmp_path)) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("option", ['precision="16-mixed"', 'precision="bf16-mixed"', "sync_batchnorm=True"])
def test_all_gpus_of_a_machine_train(tmp_path, option):
    script = short_script(tmp_path, accelerator='"gpu"', devices=f"-1, {option}")
    if "sync" in option:
        layers = "nn.ReLU(), nn.Linear(256, 10)"
        assert layers in script.read_text()
        script.write_text(script.read_text().replace(layers, "nn.BatchNorm1d(256), nn.Linear(256, 10)"))
    # Not forked: CUDA would not survive it, if an import had looked for devices.
    outputs(start(sys.executable, script, cwd=tmp_path, PYTHONPATH=python_path(ROOT)))
