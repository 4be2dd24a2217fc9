"""How replicas are started."""

from training import tokens_loader

from .registry import feature, tested_by

_HERE = "tests/trainer/test_launch.py"
for _name in ("`curvadion`", "`curvadion_spawn`", "`curvadion_fork`"):
    tested_by("launch", _name, f"{_HERE}::test_lightning_starts_a_process_for_each_device")
tested_by("launch", "`curvadion_notebook`", f"{_HERE}::test_a_notebook_forks")
tested_by("launch", "`devices=1`", f"{_HERE}::test_one_device_is_one_replica")
tested_by(
    "launch",
    "torchrun on one node",
    "tests/trainer/test_breaking.py::test_torchrun_restarts_a_killed_run_from_its_newest_checkpoint",
)
tested_by("launch", "torchrun on two nodes", "tests/examples/test_multinode.py::test_two_nodes_with_torchrun")
tested_by("launch", "SLURM", "tests/examples/test_multinode.py::test_two_nodes_with_slurm")


@feature("launch", "fit, test and fit again")
def a_trainer_may_be_used_again(run):
    trainer = run.fit()
    trainer.test(run.modules[0], tokens_loader(1), verbose=False)
    trainer.fit_loop.epoch_loop.max_steps = 12
    trainer.fit(run.modules[0])
    assert trainer.global_step == 12
