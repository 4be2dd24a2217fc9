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
def test_an_error_suggests_the_nearest_name(capsys, words, message):
    assert message in error_of(capsys, *MODEL, *words)


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
