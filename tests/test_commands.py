"""Every command that README, guide and examples print is run by a test, or the reason is here why it is not.

A command that is in none of the lists below fails the first test: whoever prints a new one adds how it is tested.
"""

import argparse
import ast
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import preloaded
import pytest
from training import ROOT, python_path

from lightning_curvadion.cli import main as command_line

DOCUMENTS = [
    *(
        ROOT / name
        for name in ("README.md", "examples/README.md", "examples/guide.md", "examples/benchmarks/README.md")
    ),
    *sorted(path for pattern in ("*.py", "*.sh", "benchmarks/*.py") for path in (ROOT / "examples").glob(pattern)),
    *sorted((ROOT / "configs").glob("*.yaml")),
    ROOT / "tests/breaking.py",
]
PROGRAMS = ("python", "pytest", "torchrun", "sbatch", "pip", "diff", "ruff", "mypy", "pre-commit", "fit")
COMMAND = re.compile(rf" *([A-Z_]+=\S+ )*({'|'.join(PROGRAMS)}|\S+\.sh) ")
FIT, BENCHMARKS = "python -m lightning_curvadion fit", "python examples/benchmarks"

# Run below, as they are printed; and what they print then. The guide quotes the plan's speed-ups.
HERE = {
    f"{BENCHMARKS}/compare.py --tables": r"\| CurvaDion, defaults \| 1\.\d+",
    f"{BENCHMARKS}/models.py --tables": r"\| mixture of experts \| 4 \| 1\.\d+",
    f"{BENCHMARKS}/quantization.py --tables": r"\| average, float32 \| \d+\.\d+ % \|",
    "diff configs/byte_gpt.yaml configs/byte_gpt_ddp.yaml": "> +strategy: ddp",
    "diff examples/switch_before.py examples/switch_after.py": "> .*split_parameters",
    "fit --optimizer.help=CurvaDion": r"--optimizer\.lr_scale ",
    "fit --trainer.strategy.help=CurvaDionStrategy": r"--trainer\.strategy\.wire_format ",
    "python -m lightning_curvadion plan --config configs/gpt_160m_multinode.yaml --link 1Gbit --latency 1ms"
    " --step-time 0.5s --coding-speed 50": r"1 Gbit/s .* 10\.15 to 15\.42\n(?s:.*)100 Gbit/s .* 0\.97 to 1\.04\n",
    f"{FIT} --trainer.strategy=curvadion --optimizer=CurvaDion --model=my.Module": "a user's own module is trained",
}
# Run by another test, as they are printed but for what is in brackets.
ELSEWHERE = {
    f"{BENCHMARKS}/compare.py --smoke": "examples/benchmarks/test_compare.py::smoke_run",
    f"{BENCHMARKS}/models.py --smoke": "examples/benchmarks/test_models.py::test_the_smoke_run_trains_every_model",
    f"{BENCHMARKS}/quantization.py --smoke": "examples/benchmarks/test_quantization_benchmark.py::test_the_smoke_run",
    f"{BENCHMARKS}/shared_work.py --smoke": "examples/benchmarks/test_shared_work.py::test_the_smoke_run",
    f"{BENCHMARKS}/step_time.py --smoke": "examples/benchmarks/test_step_time.py::test_the_smoke_run",
    f"{BENCHMARKS}/vocabulary.py --smoke": "examples/benchmarks/test_vocabulary.py::test_the_smoke_run",
    f"{BENCHMARKS}/netlab.py --hosts 2 --rate 30mbit -- your_script.py": "test_first_hour.py::hour",
    f"{BENCHMARKS}/netlab.py --hosts 2 --loopback -- train.py":
        "test_first_hour.py::hour (where there can be no lab)",
    f"{BENCHMARKS}/netlab.py --hosts 2 --rate 30mbit -- train.py --max_steps 100":
        "examples/benchmarks/test_netlab.py::start_hanging_lab (another script)",
    "python -m lightning_curvadion report lightning_logs/version_0": "test_first_hour.py::hour (and another run)",
    "python examples/resuming.py": "examples/test_resuming.py::test_a_killed_run_is_resumed_bit_for_bit",
    "python compare_replica.py RUNS_JSON CSV": "examples/benchmarks/test_compare.py::smoke_run (by compare.py)",
    # Replicas that have imported torch already.
    "python examples/fabric.py": "examples/test_fabric.py::test_the_script_trains (workers of the pool)",
    "torchrun --standalone --nproc-per-node 2 examples/plain_loop.py":
        "examples/test_plain_loop.py::test_the_plain_loop_trains (workers of the pool)",
    "python examples/elastic.py": "trainer/test_elastic.py::loses_and_gains (another script)",
    "MASTER_ADDR=10.0.0.1 MASTER_PORT=29400 python examples/elastic.py --train":
        "examples/test_elastic_example.py::test_replicas_of_one_address_are_one_run (at another address)",
    "python -m lightning_curvadion store --port 29400":
        "examples/test_elastic_example.py::test_replicas_of_one_address_are_one_run (at a free port)",
    "python tests/storm.py --trainer": "trainer/test_elastic.py::loses_and_gains (once, instead of 20 times)",
    "python tests/trainer/elastic_features.py": "trainer/test_elastic.py::test_a_feature_trains_as (one of them)",
    "python tests/kill_points.py": "trainer/test_elastic.py::runs (one of its points)",
    "python tests/handover_cost.py":
        "sync/test_transfer_to_newcomers.py::test_the_others_train_while_a_newcomer_receives_the_model (no lab)",
    "python tests/storm.py": "sync/test_membership.py::killed (once, instead of 20 times)",
    "python examples/sharded.py": "examples/test_sharded_example.py::test_a_process_holds_a_half (workers of the pool)",
    "python examples/switch_before.py": "examples/test_switch.py::test_the_script_learns (forked)",
    "python examples/switch_after.py": "examples/test_switch.py::test_the_script_learns (forked)",
    # They need minutes, or a cluster.
    f"{FIT} --config configs/byte_gpt.yaml": "examples/test_byte_gpt.py::test_the_main_job_trains (12 of 600 steps)",
    f"{FIT} --config FILE": "cli/test_configs.py::fit (some steps of each)",
    f"{FIT} --config configs/byte_gpt_ddp.yaml": "cli/test_configs.py::test_the_same_job_under_ddp_trains (8 steps)",
    f"{FIT} --config configs/byte_gpt.yaml --seed_everything 1 --trainer.callbacks+=ModelCheckpoint"
    " --trainer.callbacks.every_n_train_steps=20":
        "cli/test_configs.py::test_the_main_job_with_more_checkpoints (22 steps)",
    f"{FIT} --config configs/digits_vit.yaml": "cli/test_configs.py::test_the_digits_are_learnt (50 steps)",
    f"{FIT} --config configs/gpt2_hf.yaml": "cli/test_configs.py::test_a_gpt2_of_hugging_face (12 steps)",
    f"{FIT} --config configs/hf_finetune.yaml": "cli/test_configs.py::test_a_hugging_face_model (12 steps)",
    f"{FIT} --config configs/resnet.yaml": "cli/test_configs.py::test_a_resnet_learns_the_digits (60 steps)",
    "NODES=4 GPUS=8 NODE_RANK=0 MASTER_ADDR=node0 examples/multinode_torchrun.sh --data.folder=/data/tokens":
        "examples/test_multinode.py::test_two_nodes_with_torchrun (two nodes, a small model)",
    "sbatch examples/multinode_slurm.sh --data.folder=/data/tokens":
        "examples/test_multinode.py::test_two_nodes_with_slurm (two nodes, a small model)",
    "sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 examples/multinode_slurm.sh --data.folder=/data/tokens":
        "examples/test_multinode.py::test_two_nodes_with_slurm (two nodes, a small model)",
    f"{BENCHMARKS}/scaling.py": "test_readme.py::test_the_predictions_for_large_models (the smallest model)",
    f"{BENCHMARKS}/delay_line.py 0.025 port0 port1":
        "examples/benchmarks/test_netlab.py::test_every_frame_takes_the_latency (by the lab)",
    f"{BENCHMARKS}/delays.py --smoke": "examples/benchmarks/test_delays_benchmark.py::test_the_smoke_run",
    f"{BENCHMARKS}/heterogeneous.py --smoke": "examples/benchmarks/test_heterogeneous_benchmark.py::test_the_smoke_run",
    f"{BENCHMARKS}/latency.py --smoke": "examples/benchmarks/test_latency.py::test_the_smoke_run",
    f"{BENCHMARKS}/netlab.py --hosts 2 --rate 30mbit --latency 25ms -- train.py --max_steps 100":
        "examples/benchmarks/test_netlab.py::start_hanging_lab (another script and latency)",
    **{f"torchrun --standalone --nproc-per-node 2 examples/profiling.py{folder}":
        "examples/test_profiling.py::test_the_trace_of_each_rank (workers of the pool)"
        for folder in ("", " --folder traces", " --folder traces --overlap 2")},
    "python tests/gpu/check_device.py": "gpu/test_check_device.py::test_the_short_form (--smoke, on a CPU)",
    "python tests/breaking.py": "trainer/test_breaking.py::test_survivors_of_a_kill (shorter, as its other tests)",
    "python tests/breaking.py kills": "trainer/test_breaking.py::test_survivors_of_a_kill (3 of 20)",
}  # fmt: skip
# Parsed below and not run: minutes to hours, or a download. The smoke form of each script is run.
PARSED = [
    f"{BENCHMARKS}/compare.py --run",
    f"{BENCHMARKS}/compare.py --run sweep",
    f"{BENCHMARKS}/compare.py --plots",  # overwrites the pictures; the smoke form draws some too
    f"{BENCHMARKS}/delays.py",
    f"{BENCHMARKS}/delays.py --rate 12mbit --model 1m",
    f"{BENCHMARKS}/delays.py --rate 100mbit --latency 25ms --replicas 4",
    f"{BENCHMARKS}/heterogeneous.py",
    f"{BENCHMARKS}/latency.py",
    f"{BENCHMARKS}/models.py",
    f"{BENCHMARKS}/models.py sweep --only LSTM",
    f"{BENCHMARKS}/quantization.py",
    f"{BENCHMARKS}/quantization.py --blocks",
    f"{BENCHMARKS}/quantization.py --train",
    f"{BENCHMARKS}/shared_work.py",
    f"{BENCHMARKS}/step_time.py",
    f"{BENCHMARKS}/step_time.py --rounds 2 --muon-rounds 1",
    f"{BENCHMARKS}/two_levels.py",
    f"{BENCHMARKS}/two_levels.py --seeds 0",
    f"{BENCHMARKS}/two_levels.py --smoke",  # two labs, a minute
    f"{BENCHMARKS}/two_levels.py --rate 12mbit --stop 120",
    f"{BENCHMARKS}/vocabulary.py",
    f"{BENCHMARKS}/vocabulary.py --shares 0 0.03 --seeds 0 1",
    f"{BENCHMARKS}/vocabulary.py --shares 0 0.01 0.03 0.1 0.3 --seeds 0 1",
    f"{FIT} --config configs/gpt_160m_multinode.yaml --trainer.fast_dev_run=1 --trainer.accelerator=cpu"
    " --trainer.devices=2 --trainer.num_nodes=1 --trainer.precision=32-true --data.batch_size=1 --data.folder=FOLDER"
    " --trainer.callbacks=[]",
    f"{FIT} --config configs/hf_finetune.yaml --model.source=Qwen/Qwen3-0.6B --data.tokenizer=Qwen/Qwen3-0.6B"
    " --data.path=your.txt",
]
# What CI runs before and after it runs this, in .ci/run: it needs an index of packages.
BY_CI = [
    "pip install -e .[test]", "ruff check .", "ruff format --check .", "mypy", "pytest", "ruff check", "ruff format",
    "pip install .", "pip install .[report]", "pip install pre-commit", "pre-commit install",
]  # fmt: skip
# Named in a sentence.
MENTIONED = ["torchrun --max-restarts", "python -m lightning_curvadion"]


def commands_in(text: str) -> Iterator[str]:
    """Commands of a line, without comments, in one spelling."""
    for part in re.split(r"&&|;", text):
        words = shlex.split(part, comments=True)
        program = next((word for word in words if not re.fullmatch(r"[A-Z_]+=.*", word)), "")
        if program in PROGRAMS or program.endswith(".sh"):
            yield " ".join(words)


def printed_in(path: Path) -> Iterator[str]:
    """Commands of a Markdown page; of a module's docstring; of the comments at the top of a script or a config."""
    text = path.read_text()
    if path.suffix == ".md":
        text = text.replace("\\\n", " ")
        lines = [line for block in re.findall(r"```bash\n(.*?)```", text, flags=re.S) for line in block.splitlines()]
        text = re.sub(r"```.*?```", "", text, flags=re.S)
    else:
        if path.suffix == ".py":
            text = ast.get_docstring(ast.parse(text)) or ""
        else:
            comments = re.match(r"(?:#.*\n)*", text)[0]
            # A line that is indented further goes on.
            text = re.sub(r"^# ?", "", re.sub(r"\n#     +(?=\S)", " ", comments), flags=re.M)
        lines = [line for line in text.replace("\\\n", " ").splitlines() if COMMAND.match(line)]
    for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text):
        # A word alone is a name.
        yield from commands_in(span) if " " in span else ()
    for line in lines:
        yield from commands_in(line)


PRINTED = {command: path for path in DOCUMENTS for command in printed_in(path)}


OF_PYTEST = [command for command in PRINTED if re.match(r"([A-Z_]+=\S+ )?pytest ", command)]


def test_every_printed_command_has_a_test_or_a_reason():
    known = {*HERE, *ELSEWHERE, *PARSED, *BY_CI, *MENTIONED, *OF_PYTEST}
    assert {command: path.name for command, path in PRINTED.items() if command not in known} == {}
    assert known - PRINTED.keys() == set(), "printed nowhere"


@pytest.mark.parametrize("command", HERE)
def test_a_printed_command_runs(command, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    program, *words = shlex.split(command)
    if program == "diff":
        assert subprocess.run([program, *words], timeout=10).returncode == 1, "they differ"
        printed = capfd.readouterr().out
    elif "--model=my.Module" in words:
        printed = printed_by_the_program(tmp_path, words[2:])
    else:
        monkeypatch.setattr(sys, "argv", ["curvadion"] if words[0] == "-m" or program == "fit" else words)
        assert status_of(program, words) == 0
        printed = capfd.readouterr().out
    assert re.search(HERE[command], printed), printed[-2000:]


def status_of(program, words):
    """The exit status of a command that runs in this process."""
    try:
        if words[0] == "-m" or program == "fit":
            return command_line.main([program, *words] if program == "fit" else words[2:])
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    return 0


MY_MODULE = """
from lightning.pytorch.demos.boring_classes import BoringModel

class Module(BoringModel):
    # Or it would train for a thousand epochs.
    def on_train_batch_end(self, *_):
        self.trainer.should_stop = True

    def on_train_end(self):
        print("a user's own module is trained after step", self.trainer.global_step)
"""


def printed_by_the_program(folder, words):
    """What the console script prints, in a folder with a ``my.py``."""
    (folder / "my.py").write_text(MY_MODULE)
    script = folder / "program.py"
    script.write_text("import sys\nfrom lightning_curvadion.cli.main import program\nsys.exit(program())")
    process = preloaded.start(script, *words, folder=folder, output=folder / "output", PYTHONPATH=python_path(ROOT))
    try:
        assert process.wait(60) == 0, (folder / "output").read_text()
    finally:
        process.kill()
    return (folder / "output").read_text()


class Parsed(Exception):
    """Instead of the run."""


@pytest.mark.parametrize("command", PARSED)
def test_a_command_that_would_take_long_is_parsed(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    _, *words = shlex.split(command)
    if words[0] == "-m":
        if "hf_finetune" in command:
            pytest.importorskip("transformers")
        monkeypatch.setattr(sys, "argv", ["curvadion"])
        with pytest.raises(SystemExit) as end:
            command_line.main([*words[2:], "--print_config"])
        assert end.value.code == 0 and "trainer:" in capsys.readouterr().out
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_alone(self, *args, **options):
        parse(self, *args, **options)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_alone)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(Parsed):
        runpy.run_path(words[0], run_name="__main__")


@pytest.mark.parametrize("command", ELSEWHERE)
def test_the_test_that_runs_a_command_is_there(command):
    path, _, rest = ELSEWHERE[command].partition("::")
    assert re.search(rf"^def {rest.split()[0]}", (ROOT / "tests" / path).read_text(), flags=re.M)


@pytest.mark.parametrize("command", OF_PYTEST)
def test_a_printed_call_of_pytest_selects_tests_of_this_suite(command):
    words = [word for word in shlex.split(command) if word != "-s" and "=" not in word][1:]
    keyword = words[words.index("-k") + 1] if "-k" in words else ""
    files = [ROOT / word for word in words if word not in ("-k", keyword)]
    assert files and all(file.exists() for file in files)
    modules = [module for file in files for module in ([file] if file.is_file() else file.rglob("test_*.py"))]
    names = [name for module in modules for name in re.findall(r"def (test_\w+)|>>> ", module.read_text())]
    assert [name for name in names if keyword in name]
