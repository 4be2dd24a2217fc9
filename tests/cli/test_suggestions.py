"""Errors of the command line suggest the nearest known name."""

import sys

import pytest
from training import ROOT

from lightning_curvadion.cli.main import CurvaDionCLI

MODEL = ["--model=examples.byte_gpt.ByteGPT", "--model.layers=1", "--model.width=16"]
DATA = ["--data=examples.byte_gpt.StandardLibrary"]


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    # Lightning warns of arguments from Python if the process has some too, as pytest's has.
    monkeypatch.setattr(sys, "argv", ["curvadion"])


def error_of(capsys, *words):
    with pytest.raises(SystemExit):
        CurvaDionCLI(args=list(words), run=False)
    return capsys.readouterr().err.partition("error: ")[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainer.max_stepz=3"], "--trainer.max_stepz=3; did you mean --trainer.max_steps?"),
        (["--model.widht=3"], "model: Option 'widht' is not accepted; did you mean width?"),
        (["--optimizer=CurvaDoin"], "optimizer: there is no class CurvaDoin; did you mean CurvaDion?"),
        (
            ["--optimizer=CurvaDion", "--optimizer.trigger=EveryNStep"],
            "optimizer.trigger: there is no class EveryNStep; did you mean EveryNSteps?",
        ),
        (["--lr_scheduler=StepLr"], "lr_scheduler: there is no class StepLr; did you mean StepLR?"),
        (["--trainer.callbacks+=ComunicationMonitor"], "did you mean CommunicationMonitor?"),
        (["--trainer.strategy=lightning_curvadion.CurvaDionStrategi"], "did you mean CurvaDionStrategy?"),
        (["--trainer.strategy=CurvaDionStrateg"], "there is no strategy 'CurvaDionStrateg'; did you mean CurvaDionSt"),
        (
            ["--trainer.strategy=curvadion", "--trainer.strategy.wire_format=int2"],
            "'curvadion' is a name, which takes no options; put --trainer.strategy=CurvaDionStrategy before"
            " --trainer.strategy.wire_format",
        ),
        (
            ["--optimizer=CurvaDion", "--optimizer.trigger=EveryNSteps", "--optimizer.trigger.n=0"],
            "n must be an integer >= 1, not 0; EveryNSteps(1) synchronises at every step",
        ),
        (
            ["--trainer.strategy=CurvaDionStrategy", "--trainer.strategy.outer_lr=-1"],
            "outer_lr must be > 0, not -1.0; 1.0 takes the average itself",
        ),
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
            "wire_format must be one of 'float32', 'bfloat16', 'int8', 'int4', 'int2', 'sign', not 'int3'",
        ),
    ],
)
def test_an_error_is_one_line_that_suggests_the_nearest_name(capsys, words, message):
    error = error_of(capsys, *MODEL, *words)
    assert message in error and error.count("\n") == 1


def test_an_error_of_the_users_model_keeps_its_traceback(monkeypatch):
    with pytest.raises(ValueError, match="division") as caught:
        CurvaDionCLI(args=[*MODEL, "--model.heads=0"], run=False)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("trainer: {max_stepz: 3}", "'max_stepz'; did you mean max_steps?"),
        ("modle: {class_path: x}", "did you mean model?"),
        ("model: {class_path: examples.byte_gpt.ByteGTP}", "did you mean ByteGPT?"),
    ],
)
def test_an_error_in_a_file_suggests_the_nearest_name(capsys, tmp_path, wrong, message):
    (tmp_path / "wrong.yaml").write_text(wrong)
    assert message in error_of(capsys, f"--config={tmp_path / 'wrong.yaml'}")


def test_an_unknown_link_suggests_the_nearest_argument(capsys):
    error = error_of(capsys, *MODEL, *DATA, "--links={model.contxt: data.context}")
    assert "no argument model.contxt; did you mean model.context?" in error
