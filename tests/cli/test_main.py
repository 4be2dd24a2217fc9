"""The command line: everything from files, words and variables, and errors that name the nearest right thing."""

import re
import sys

import pytest
import torch
import yaml
from training import ROOT

from lightning_curvadion import CurvaDion, CurvaDionStrategy, IntegratedRMMC
from lightning_curvadion.cli import main

MODEL = ["--model=examples.byte_gpt.ByteGPT", "--model.layers=1", "--model.width=16"]
DATA = ["--data=examples.byte_gpt.StandardLibrary"]


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    # Lightning warns of arguments from within Python where the process has some, as pytest's has.
    monkeypatch.setattr(sys, "argv", ["curvadion"])


def parsed(*words):
    return main.CurvaDionCLI(args=list(words), run=False)


def error_of(capsys, *words):
    with pytest.raises(SystemExit):
        parsed(*words)
    return capsys.readouterr().err.partition("error: ")[2]


def test_an_optimizer_and_its_groups_without_code():
    built = parsed(
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
        "embeddings": ("adamw", 0.003),
        "output head": ("adamw", 0.003),
        "norms": ("adamw", 0.5),
        "gpt.blocks.*.out.weight (matrices)": ("lion", 0.02),
    }


def test_another_optimizer_gets_the_models_parameters():
    optimizer = parsed(*MODEL, "--optimizer=AdamW", "--optimizer.lr=0.1").model.configure_optimizers()
    assert type(optimizer) is torch.optim.AdamW and len(optimizer.param_groups) == 1


def test_a_plateau_scheduler_says_what_it_watches():
    words = ["--optimizer=CurvaDion", "--lr_scheduler=lightning.pytorch.cli.ReduceLROnPlateau"]
    configured = parsed(*MODEL, *words, "--lr_scheduler.monitor=val_loss").model.configure_optimizers()
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
    built = parsed(f"--config={tmp_path / 'first.yaml'}", f"--config={tmp_path / 'second.yaml'}", "--model.heads=2")
    assert isinstance(built.trainer.strategy, CurvaDionStrategy) and built.trainer.max_steps == 7
    assert built.trainer.strategy.sync.settings.wire_format == "int2"
    assert len(built.model.gpt.blocks) == 2 and built.model.gpt.blocks[0].heads == 2
    assert built.model.gpt.embedding.weight.shape == (256, 32)


def test_variables_of_the_environment(monkeypatch):
    monkeypatch.setenv("PL_TRAINER__MAX_STEPS", "11")
    monkeypatch.setenv("PL_TRAINER__STRATEGY", "curvadion")
    trainer = parsed(*MODEL, "--trainer.accelerator=cpu").trainer
    assert trainer.max_steps == 11 and isinstance(trainer.strategy, CurvaDionStrategy)


def test_a_link_spares_saying_a_value_twice(capsys):
    built = parsed(*MODEL, *DATA, "--data.context=24", "--links={model.context: data.context}")
    assert built.model.gpt.cosine.shape[0] == built.datamodule.context == 24
    assert "no argument model.contxt; did you mean model.context?" in error_of(
        capsys, *MODEL, *DATA, "--links={model.contxt: data.context}"
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--trainer.max_stepz=3"], "--trainer.max_stepz=3; did you mean --trainer.max_steps?"),
        (["--model.widht=3"], "Option 'widht' is not accepted; did you mean width?"),
        (["--optimizer=CurvaDion", "--optimizer.rank_fracton=1"], "did you mean rank_fraction?"),
        (
            ["--optimizer=CurvaDion", "--optimizer.trigger=EveryNSteps", "--optimizer.trigger.m=1"],
            "'m' is not accepted",
        ),
        (["--trainer.strategy=CurvaDionStrategy", "--trainer.strategy.wire_formt=sign"], "did you mean wire_format?"),
        (["--trainer.strategy=curvadoin"], "there is no strategy 'curvadoin'; did you mean curvadion?"),
        (["--trainer.callbacks=lightning_curvadion.ComunicationMonitor"], "did you mean CommunicationMonitor?"),
        (["--trainer.max_steps=many"], "Expected a <class 'int'>. Got value: many"),
        (["--optimizer=CurvaDion", "--optimizer.lr=fast"], "Expected a <class 'float'>. Got value: fast"),
        (
            ["--trainer.strategy=CurvaDionStrategy", "--trainer.strategy.wire_format=int3"],
            "Literal['float32', 'bfloat16'",
        ),
    ],
)
def test_a_typing_error_names_the_nearest_right_thing(capsys, words, told):
    assert told in error_of(capsys, *MODEL, *words)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("trainer: {max_stepz: 3}", "'max_stepz'; did you mean max_steps?"),
        ("modle: {class_path: x}", "did you mean model?"),
        ("model: {class_path: examples.byte_gpt.ByteGTP}", "did you mean ByteGPT?"),
    ],
)
def test_a_typing_error_in_a_file(capsys, tmp_path, wrong, told):
    (tmp_path / "wrong.yaml").write_text(wrong)
    assert told in error_of(capsys, f"--config={tmp_path / 'wrong.yaml'}")


@pytest.mark.parametrize("thing", ["CurvaDion", "CurvaDionStrategy", "IntegratedRMMC", "CommunicationBudget"])
def test_help_explains_every_argument(capsys, thing):
    key = {"CurvaDion": "optimizer", "CurvaDionStrategy": "trainer.strategy"}.get(thing, "optimizer.trigger")
    base = ["--optimizer=CurvaDion"] if "trigger" in key else []
    with pytest.raises(SystemExit):
        parsed(*base, f"--{key}.help={thing}")
    told = re.split(r"^  --", capsys.readouterr().out, flags=re.M)[1:]
    explained = {text.split()[0]: text.partition("(type:")[0].split()[1:] for text in told if ".help" not in text}
    assert explained
    for name, words in explained.items():
        assert len([word for word in words if word[:-1].islower()]) >= 1, f"{name}: {words}"


def test_the_configuration_can_be_printed_and_read_again(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main.main(["fit", "--config=configs/byte_gpt.yaml", "--model.width=32", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trainer"]["strategy"] == "curvadion" and printed["links"] == {"model.context": "data.context"}
    # Of the command, not of the classes.
    for name in ("ckpt_path", "weights_only"):
        printed.pop(name, None)
    (tmp_path / "printed.yaml").write_text(yaml.safe_dump(printed))
    built = parsed(f"--config={tmp_path / 'printed.yaml'}")
    assert built.trainer.max_steps == 600 and built.model.gpt.head.in_features == 32


def test_own_commands_are_reached(capsys, tmp_path):
    assert main.main(["report", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
