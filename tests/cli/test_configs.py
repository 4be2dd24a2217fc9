"""The configs: each trains for a few steps from the command line. And the modules that they name."""

import csv
import difflib
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_curvadion import split_parameters
from lightning_curvadion.cli.main import main

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """Trains a config with forked replicas, which need not import torch again.

    Returns a function from a column of the metrics file to its values.
    """
    monkeypatch.chdir(ROOT)
    # Lightning leaves the address of its process group in the environment.
    monkeypatch.setattr(os, "environ", os.environ.copy())
    # Lightning warns of arguments from Python if the process has some too, as pytest's has.
    monkeypatch.setattr(sys, "argv", ["lightning_curvadion"])

    def fit(name, *words):
        words = [*words, "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1"]
        files = f"--trainer.logger.init_args.save_dir={tmp_path}"
        config = CONFIGS / name
        strategy = yaml.safe_load(config.read_text())["trainer"]["strategy"]
        assert main(["fit", "--config", str(config), files, f"--trainer.strategy={strategy}_fork", *words]) == 0
        newest = max((tmp_path / "lightning_logs").glob("version_*"), key=lambda folder: folder.name)
        with (newest / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        return lambda column: [float(row[column]) for row in rows if row[column]]

    return fit


def test_the_same_job_under_ddp_differs_in_a_few_lines():
    curvadion, ddp = ((CONFIGS / name).read_text().splitlines() for name in ("byte_gpt.yaml", "byte_gpt_ddp.yaml"))
    added = [line[2:] for line in difflib.ndiff(curvadion, ddp) if line[0] == "+" and not line[2:].startswith("#")]
    assert added == [
        "  strategy: ddp",
        "      class_path: torch.optim.AdamW",
        "        lr: 0.003",
        "        betas: [0.9, 0.95]",
        "    vector_lr: 0.003",
    ]


def test_the_same_job_under_ddp_trains(fit, tmp_path, capfd):
    # tests/examples/test_byte_gpt.py trains it with strategy: curvadion.
    metrics = fit(
        "byte_gpt_ddp.yaml", "--trainer.max_steps=8", "--trainer.val_check_interval=8", "--model.layers=2",
        f"--data.cache={tmp_path / 'data'}", "--data.val_sequences=64",
    )  # fmt: skip
    table = capfd.readouterr().out.partition("Communication of this run (DDPStrategy)")[2]
    rows = dict(re.findall(r"^  (\S.*?)  +(\S.*)$", table, flags=re.M))
    assert (rows["sync steps"], rows["sync rate"], rows["share of DDP"]) == ("8", "100.0 %", "100 %")
    (val_loss,) = metrics("val_loss")
    assert val_loss < 0.95 * math.log(256)


def test_the_main_job_resumed_with_more_steps_trains_on(fit, tmp_path):
    small = [
        "--trainer.limit_train_batches=3", "--trainer.val_check_interval=3", "--trainer.limit_val_batches=1",
        "--model.layers=1", f"--data.cache={tmp_path / 'data'}",
    ]  # fmt: skip
    fit("byte_gpt.yaml", "--trainer.max_steps=3", *small)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    losses = fit("byte_gpt.yaml", "--trainer.max_steps=5", f"--ckpt_path={checkpoint}", *small)("loss")
    assert len(losses) == 2
    assert [torch.load(path)["global_step"] for path in sorted(tmp_path.rglob("*.ckpt"))] == [3, 5]


def test_the_main_job_with_more_checkpoints(fit, tmp_path):
    # As the guide prints it, and shorter.
    fit(
        "byte_gpt.yaml", "--seed_everything", "1", "--trainer.callbacks+=ModelCheckpoint",
        "--trainer.callbacks.every_n_train_steps=20", "--trainer.max_steps=22", "--trainer.limit_train_batches=22",
        "--trainer.val_check_interval=22", "--trainer.limit_val_batches=1", "--model.layers=1", "--model.width=32",
        f"--data.cache={tmp_path / 'data'}",
    )  # fmt: skip
    assert sorted(torch.load(path)["global_step"] for path in tmp_path.rglob("*.ckpt")) == [20, 22]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_one_number_says_when_a_config_ends(path):
    trainer = yaml.safe_load(path.read_text())["trainer"]
    assert ("max_steps" in trainer) != ("max_epochs" in trainer), "a resumed run would end at the other one"


def test_the_digits_are_learnt(fit):
    pytest.importorskip("sklearn")
    metrics = fit(
        "digits_vit.yaml", "--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=1",
        "--trainer.limit_train_batches=25", "--model.layers=2",
    )  # fmt: skip
    first, second = metrics("val_accuracy")
    assert 0.1 < first < second and second > 0.3, "a tenth is chance"
    assert len(metrics("loss")) == 50


def test_a_resnet_learns_the_digits_at_one_learning_rate(fit):
    pytest.importorskip("sklearn")
    metrics = fit(
        "resnet.yaml", "--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=1",
        "--trainer.limit_train_batches=30", "--model.width=8",
    )  # fmt: skip
    first, second = metrics("val_accuracy")
    assert 0.1 < first < second and second > 0.7, "a tenth is chance"


def test_a_gpt2_of_hugging_face_trains_at_one_learning_rate(fit):
    pytest.importorskip("transformers")
    metrics = fit("gpt2_hf.yaml", "--trainer.max_steps=12", "--trainer.check_val_every_n_epoch=null")
    losses = metrics("loss")
    assert losses[0] == pytest.approx(math.log(256), rel=0.05) and losses[-1] < 0.85 * losses[0]


def test_the_digits_keep_a_parameter_of_every_kind():
    pytest.importorskip("sklearn")
    from examples.digits_vit import DigitsViT

    groups = yaml.safe_load((CONFIGS / "digits_vit.yaml").read_text())["groups"]
    kinds = {group["name"]: group for group in split_parameters(DigitsViT(), **groups)}
    positions = kinds.pop("positions (other parameters)")
    assert positions["weight_decay"] == 0 and positions["lr"] == groups["options"]["adamw"]["lr"]
    assert set(kinds) == {"matrices", "packed matrices", "output head", "convolutions", "norms", "biases"}


def test_a_hugging_face_model_trains_and_is_saved(fit, tmp_path):
    transformers = pytest.importorskip("transformers")
    source = Path(subprocess.__file__)
    steps = ["--trainer.max_steps=12", "--trainer.val_check_interval=12"]
    metrics = fit("hf_finetune.yaml", *steps, f"--data.path={source}")
    losses = metrics("loss")
    assert losses[0] == pytest.approx(math.log(256), rel=0.05) and losses[-1] < 0.85 * losses[0]
    (val_loss,) = metrics("val_loss")
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lightning_logs/version_0/model")
    text = list(source.read_bytes())
    sequences = len(text) // 128
    held_out = torch.tensor(text[: sequences * 128]).view(-1, 128)[-(sequences // 10) :]
    # Not exactly: the Trainer averages over batches, and pads the last one.
    with torch.no_grad():
        assert saved(input_ids=held_out, labels=held_out).loss.item() == pytest.approx(val_loss, rel=0.02)


def test_groups_of_hugging_face_parameters():
    pytest.importorskip("transformers")
    from examples.hf_finetune import CausalLM

    def kinds(source):
        groups = split_parameters(CausalLM(source))
        return {group["name"]: [name for name, _ in group["params"]] for group in groups}

    llama = yaml.safe_load((CONFIGS / "hf_finetune.yaml").read_text())["model"]["init_args"]["source"]
    tied = kinds(llama)
    assert set(tied) == {"matrices", "embeddings", "norms"}
    assert len(tied["matrices"]) == 2 * 7 and len(tied["norms"]) == 2 * 2 + 1
    untied = kinds({**llama, "tie_word_embeddings": False})
    assert untied["output head"] == ["model.lm_head.weight"]

    gpt2 = {"model_type": "gpt2", "vocab_size": 256, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
    gpt2 |= {"bos_token_id": None, "eos_token_id": None}
    kept = kinds(gpt2)
    assert len(kept["transposed matrices"]) == 3
    assert kept["transposed packed matrices"] == ["model.transformer.h.0.attn.c_attn.weight"]


def test_bad_sources_and_texts(tmp_path):
    pytest.importorskip("transformers")
    from examples.hf_finetune import CausalLM, TextFile

    with pytest.raises(ValueError, match="source needs a model_type, such as llama, beside hidden_size"):
        CausalLM({"hidden_size": 8})
    short = tmp_path / "short.txt"
    short.write_text("a" * 100)
    with pytest.raises(ValueError, match=r"short.txt has 100 tokens; ten sequences of 16 are the least"):
        TextFile(str(short), context=16).setup("fit")
