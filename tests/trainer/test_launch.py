"""Every way to start replicas: by Lightning, by torchrun on one node and on two, one replica alone, and by SLURM."""

import re
import subprocess
import sys

import pytest
import test_examples
from breaking import environment
from training import ROOT, run_script

from examples.benchmarks.netlab import Lab, missing


def short_script(strategy="curvadion", **trainer):
    """The example of a switched script, with a few steps and the monitor, told how it is started."""
    script = (ROOT / "examples/switch_after.py").read_text()
    for old, new in (
        ('"curvadion"', f'"{strategy}"'),
        ("import CurvaDion", "import CommunicationMonitor, CurvaDion"),
        ("max_epochs=3", "max_epochs=1, limit_train_batches=8, callbacks=[CommunicationMonitor()]"),
    ):
        assert old in script
        script = script.replace(old, new)
    for name, value in trainer.items():
        script, count = re.subn(rf"\b{name}=\w+", f"{name}={value}", script)
        assert count == 1, name
    return script


def replicas_of(output):
    """What the monitor's table says, printed by rank 0 alone."""
    (replicas,) = re.findall(r"replicas +(\d+)", output)
    assert "Strategy)" in output
    return int(replicas)


@pytest.mark.parametrize("name", ["curvadion", "curvadion_spawn", "curvadion_fork", "curvadion_notebook"])
def test_other_launchers(tmp_path, name):
    done = run_script(short_script(name), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert replicas_of(done.stdout) == 2


def test_one_device(tmp_path):
    done = run_script(short_script(devices=1), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert replicas_of(done.stdout) == 1


def test_torchrun_on_one_node(tmp_path):
    (tmp_path / "script.py").write_text(short_script())
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "script.py"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert replicas_of(done.stdout) == 2


@pytest.mark.skipif(bool(missing()), reason=f"missing for a network lab: {missing()}")
def test_torchrun_on_two_nodes(tmp_path, capfd):
    script = tmp_path / "script.py"
    script.write_text(short_script(devices="1, num_nodes=2"))
    with Lab(hosts=2) as lab:
        lab.run([str(script)], environment=environment(), timeout=120)
        traffic = lab.traffic()
    assert replicas_of(capfd.readouterr().out) == 2
    assert all(host.sent > 100_000 for host in traffic)


@pytest.mark.gpu
@pytest.mark.parametrize("option", ['precision="16-mixed"', 'precision="bf16-mixed"', "sync_batchnorm=True"])
def test_on_gpus(tmp_path, option):
    script = short_script().replace('accelerator="cpu", devices=2', f'accelerator="gpu", devices=-1, {option}')
    if "sync" in option:
        script = script.replace("nn.ReLU(), nn.Linear(256, 10)", "nn.BatchNorm1d(256), nn.Linear(256, 10)")
    assert option in script
    done = run_script(script, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


# As the README calls them.
LAUNCHES = {
    "`curvadion`": test_other_launchers,
    "`curvadion_spawn`": test_other_launchers,
    "`curvadion_fork`": test_other_launchers,
    "`curvadion_notebook`": test_other_launchers,
    "`devices=1`": test_one_device,
    "torchrun on one node": test_torchrun_on_one_node,
    "torchrun on two nodes": test_torchrun_on_two_nodes,
    "SLURM": test_examples.test_two_nodes_with_slurm,
}
