"""``examples/token_shards.py``: windows of tokens, and a loader that resumes within an epoch."""

import lightning.pytorch as pl
import numpy as np
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from training import trainer_for

from examples.token_shards import HEADER, MAGIC, TokenShards, TokenWindows
from lightning_curvadion import CurvaDion, split_parameters


def test_every_kind_of_shard_gives_the_same_windows(tmp_path):
    tokens = np.arange(40, dtype=np.uint16)
    tokens.tofile(tmp_path / "plain.bin")
    np.save(tmp_path / "array.npy", tokens.astype(np.int32))
    header = np.zeros(256, np.int32)
    header[:3] = MAGIC, 1, 40
    (tmp_path / "header.bin").write_bytes(header.tobytes() + tokens.tobytes())
    expected = [list(range(start, start + 9)) for start in range(0, 32, 8)]
    for name in ("plain.bin", "array.npy", "header.bin"):
        assert [window.tolist() for window in TokenWindows([tmp_path / name], length=8)] == expected


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


def test_a_folder_without_shards_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no shards for val: .*--data.folder"):
        TokenShards(str(tmp_path), context=8).windows("val")


class Recorder(pl.LightningModule):
    """Records its batches."""

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
    """The batches of six steps of a replica, of which four are an epoch; it saves after three."""
    pl.seed_everything(0, verbose=False)
    module = Recorder()
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)
    trainer = trainer_for(rank, world, max_steps=6, max_epochs=9, callbacks=[saving], enable_checkpointing=True)
    trainer.fit(module, datamodule=TokenShards(folder, context=8, batch_size=2, workers=0), ckpt_path=resume)
    return module.seen


def test_a_resumed_run_continues_with_the_next_windows(replicas, tmp_path):
    (np.arange(4 * 2 * 2 * 8 + 1) % 64).astype(np.uint16).tofile(tmp_path / "train.bin")
    whole = replicas.run(2, batches_of, str(tmp_path))
    resumed = replicas.run(2, batches_of, str(tmp_path), str(tmp_path / "step=3.ckpt"))
    for seen, again in zip(whole, resumed, strict=True):
        assert len(seen) == 6 and again == seen[3:]
        assert sorted(seen[:4]) != seen[:4], "shuffled"
