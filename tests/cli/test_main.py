"""The command line: settings from files, arguments and environment variables."""

import re
import sys

import pytest
import torch
import yaml
from ahead import ahead
from launching import outputs, start
from training import ROOT, python_path

from lightning_curvadion import CurvaDion, CurvaDionStrategy, DriftThreshold, IntegratedRMMC
from lightning_curvadion.cli import main

MODEL = ["--model=examples.byte_gpt.ByteGPT", "--model.layers=1", "--model.width=16"]
DATA = ["--data=examples.byte_gpt.StandardLibrary"]


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    # Lightning warns of arguments from Python if the process has some too, as pytest's has.
    monkeypatch.setattr(sys, "argv", ["curvadion"])


def parse(*words):
    return main.CurvaDionCLI(args=list(words), run=False)


def test_an_optimizer_and_its_groups_without_code():
    built = parse(
        *MODEL, "--optimizer=CurvaDion", "--optimizer.lr=0.02", "--optimizer.trigger=IntegratedRMMC",
        "--optimizer.trigger.budget=0.7", "--groups.options={adamw: {lr: 0.003}, norms: {lr: 0.5}}",
        "--groups.overrides={gpt.blocks.*.out.weight: lion}", "--lr_scheduler=LinearLR",
        "--lr_scheduler.total_iters=10", "--lr_interval=step",
    )  # fmt: skip
    configured = built.model.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]
    assert isinstance(optimizer, CurvaDion) and isinstance(optimizer.trigger, IntegratedRMMC)
    assert optimizer.trigger.budget == 0.7 and schedule["interval"] == "step"
    assert isinstance(schedule["scheduler"], torch.optim.lr_scheduler.LinearLR)
    lr_of = {group["name"]: (group["algorithm"], group["initial_lr"]) for group in optimizer.param_groups}
    assert lr_of == {
        "matrices": ("dion", 0.02),
        "packed matrices": ("dion", 0.02),
        "embeddings": ("adamw", 0.003),
        "output head": ("adamw", 0.003),
        "norms": ("adamw", 0.5),
        "gpt.blocks.*.out.weight (matrices)": ("lion", 0.02),
    }


def test_the_drift_threshold_without_code():
    words = ["--optimizer=CurvaDion", "--optimizer.trigger=DriftThreshold", "--optimizer.trigger.tau=0.02"]
    trigger = parse(*MODEL, *words).model.configure_optimizers().trigger
    assert isinstance(trigger, DriftThreshold) and trigger.tau == 0.02


def test_the_scale_of_the_learning_rate_without_code():
    words = ["--optimizer=CurvaDion", "--optimizer.lr_scale=match_rms_adamw", "--groups.options={matrices: {lr: 0.1}}"]
    groups = parse(*MODEL, *words).model.configure_optimizers().param_groups
    assert {group["lr_scale"] for group in groups} == {"match_rms_adamw"} and groups[0]["lr"] == 0.1
    with pytest.raises(SystemExit):
        parse(*MODEL, "--optimizer=CurvaDion", "--optimizer.lr_scale=rms")


def test_another_optimizer_gets_all_parameters():
    optimizer = parse(*MODEL, "--optimizer=AdamW", "--optimizer.lr=0.1").model.configure_optimizers()
    assert type(optimizer) is torch.optim.AdamW and len(optimizer.param_groups) == 1


def test_a_plateau_scheduler_keeps_its_monitor():
    words = ["--optimizer=CurvaDion", "--lr_scheduler=lightning.pytorch.cli.ReduceLROnPlateau"]
    configured = parse(*MODEL, *words, "--lr_scheduler.monitor=val_loss").model.configure_optimizers()
    assert configured["lr_scheduler"]["monitor"] == "val_loss"


def test_short_names_of_strategy_and_callbacks_in_a_file(tmp_path):
    config = {
        "trainer": {
            "accelerator": "cpu",
            "strategy": {"class_path": "CurvaDionStrategy", "init_args": {"wire_format": "int2"}},
            "callbacks": [{"class_path": "CommunicationMonitor"}],
            "logger": False,
        },
        "model": {"class_path": "examples.byte_gpt.ByteGPT", "init_args": {"width": 32}},
    }
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "second.yaml").write_text("trainer: {max_steps: 7}\nmodel: {init_args: {layers: 2}}\n")
    built = parse(f"--config={tmp_path / 'first.yaml'}", f"--config={tmp_path / 'second.yaml'}", "--model.heads=2")
    assert isinstance(built.trainer.strategy, CurvaDionStrategy) and built.trainer.max_steps == 7
    assert built.trainer.strategy.sync.settings.wire_format == "int2"
    assert len(built.model.gpt.blocks) == 2 and built.model.gpt.blocks[0].heads == 2
    assert built.model.gpt.embedding.weight.shape == (256, 32)


@pytest.mark.parametrize("word", ["CurvaDionStrategy", "lightning_curvadion.CurvaDionStrategy"])
def test_a_strategy_is_named_by_its_class_alone(word):
    trainer = parse(*MODEL, f"--trainer.strategy={word}", "--trainer.accelerator=cpu", "--trainer.max_steps=7").trainer
    assert isinstance(trainer.strategy, CurvaDionStrategy) and trainer.max_steps == 7


def test_variables_of_the_environment(monkeypatch):
    monkeypatch.setenv("PL_TRAINER__MAX_STEPS", "11")
    monkeypatch.setenv("PL_TRAINER__STRATEGY", "curvadion")
    trainer = parse(*MODEL, "--trainer.accelerator=cpu").trainer
    assert trainer.max_steps == 11 and isinstance(trainer.strategy, CurvaDionStrategy)


def test_a_link_copies_a_value():
    built = parse(*MODEL, *DATA, "--data.context=24", "--links={model.context: data.context}")
    assert built.model.gpt.cosine.shape[0] == built.datamodule.context == 24


@pytest.mark.parametrize(
    "thing", ["CurvaDion", "CurvaDionStrategy", "IntegratedRMMC", "CommunicationBudget", "DriftThreshold"]
)
def test_help_explains_every_argument(capsys, thing):
    key = {"CurvaDion": "optimizer", "CurvaDionStrategy": "trainer.strategy"}.get(thing, "optimizer.trigger")
    base = ["--optimizer=CurvaDion"] if "trigger" in key else []
    with pytest.raises(SystemExit):
        parse(*base, f"--{key}.help={thing}")
    entries = re.split(r"^  --", capsys.readouterr().out, flags=re.M)[1:]
    explained = {text.split()[0]: text.partition("(type:")[0].split()[1:] for text in entries if ".help" not in text}
    assert explained
    for name, words in explained.items():
        assert len([word for word in words if word[:-1].islower()]) >= 1, f"{name}: {words}"


@pytest.mark.parametrize("strategy", ["curvadion", "CurvaDionStrategy", "lightning_curvadion.CurvaDionStrategy"])
def test_the_configuration_can_be_printed_and_read_again(capsys, tmp_path, strategy):
    words = [f"--trainer.strategy={strategy}", "--model.width=32"]
    if strategy != "curvadion":
        words.insert(1, "--trainer.strategy.spread=2")
    with pytest.raises(SystemExit):
        main.main(["fit", "--config=configs/byte_gpt.yaml", *words, "--print_config"])
    text = capsys.readouterr().out
    printed = yaml.safe_load(text)
    assert printed["links"] == {"model.context": "data.context"}
    # Of the command, not of the classes.
    for name in ("ckpt_path", "weights_only"):
        printed.pop(name, None)
    (tmp_path / "printed.yaml").write_text(yaml.safe_dump(printed))
    built = parse(f"--config={tmp_path / 'printed.yaml'}")
    assert built.trainer.max_steps == 600 and built.model.gpt.head.in_features == 32
    assert built.trainer.strategy.sync.settings.spread == (1 if strategy == "curvadion" else 2)
    (tmp_path / "as_printed.yaml").write_text(text)
    with pytest.raises(SystemExit):
        main.main(["fit", f"--config={tmp_path / 'as_printed.yaml'}", "--print_config"])
    assert capsys.readouterr().out == text


def test_the_usage_names_all_commands_and_the_program(capsys, monkeypatch):
    for script, program in (("/bin/curvadion", "curvadion"), ("package/__main__.py", "python -m lightning_curvadion")):
        monkeypatch.setattr(sys, "argv", [script])
        with pytest.raises(SystemExit):
            main.main(["--help"])
        usage = capsys.readouterr().out.partition("\n\n")[0]
        commands = "fit,validate,test,predict,plan,report,store"
        assert " ".join(usage.split()) == f"usage: {program} [-c CONFIG] {{{commands}}} ..."


def test_the_help_of_a_command_says_where_the_options_of_classes_are(capsys):
    with pytest.raises(SystemExit):
        main.main(["fit", "--help"])
    end = " ".join(capsys.readouterr().out.splitlines()[-4:])
    for words in (["--optimizer.help=CurvaDion"], ["--trainer.strategy.help=CurvaDionStrategy"],
                  ["--optimizer=CurvaDion", "--optimizer.trigger.help=IntegratedRMMC"]):  # fmt: skip
        assert " ".join(words) in " ".join(end.split())
        with pytest.raises(SystemExit) as stopped:
            main.main(["fit", *words])
        assert stopped.value.code == 0 and "type: " in capsys.readouterr().out


@ahead
def installed_program(folder):
    """What the console script prints, in a folder with a module of the user's."""
    scripts = (ROOT / "pyproject.toml").read_text().partition("[project.scripts]")[2]
    module, function = re.search(r'^curvadion = "(\S+):(\S+)"$', scripts, flags=re.M).groups()
    program = folder / "bin/curvadion"
    program.parent.mkdir()
    program.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    (folder / "own.py").write_text(
        "from lightning.pytorch.demos.boring_classes import BoringModel\nclass Own(BoringModel):\n    pass\n"
    )
    words = ["--model=own.Own", "--optimizer=CurvaDion", "--trainer.strategy=curvadion", "--trainer.accelerator=cpu",
             "--trainer.devices=2", "--trainer.max_steps=2", "--trainer.logger=false"]  # fmt: skip
    (printed,) = outputs(start(sys.executable, program, "fit", *words, cwd=folder, PYTHONPATH=python_path(ROOT)))
    return printed


def test_the_installed_program_trains_two_ranks_with_a_module_of_the_working_folder(installed_program):
    assert "max_steps=2` reached" in installed_program


@ahead
def stopped_program(folder):
    words = [f"--trainer.default_root_dir={folder}", "--trainer.logger=false", "--model.optimizer.mu=3"]
    command = [sys.executable, "-m", "lightning_curvadion", "fit", "--config=configs/byte_gpt.yaml", *words]
    (printed,) = outputs(start(*command), statuses=(1,))
    return printed


def test_what_stops_two_ranks_before_training_is_one_line(stopped_program):
    assert "Traceback" not in stopped_program
    assert re.findall("^error: .*", stopped_program, flags=re.M) == [
        "error: mu must be in [0, 1), not 3.0: it is the share of the momentum kept at each step"
    ]


def test_extra_commands_are_reached(capsys, tmp_path):
    assert main.main(["report", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
