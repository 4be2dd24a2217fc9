"""Fine-tunes any causal language model of Hugging Face transformers on a text file.

python -m lightning_curvadion fit --config configs/hf_finetune.yaml

The config trains a tiny Llama from scratch on bytes and downloads nothing. A pretrained model and its tokenizer:

python -m lightning_curvadion fit --config configs/hf_finetune.yaml --model.source=Qwen/Qwen3-0.6B \
    --data.tokenizer=Qwen/Qwen3-0.6B --data.path=your.txt

The module has no ``configure_optimizers``. The config names optimizer and parameter groups instead.
"""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

try:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
except ImportError as error:
    raise ImportError("examples/hf_finetune.py needs transformers: pip install transformers") from error


class CausalLM(pl.LightningModule):
    """Next-token training of a transformers model.

    Args:
        source: Name or folder of a pretrained model. Or the configuration of a model with random weights:
            ``model_type`` and the arguments of that type.

    Raises:
        ValueError: The configuration has no ``model_type``.

    Example:
        >>> tiny = dict(model_type="llama", vocab_size=256, hidden_size=16, intermediate_size=32)
        >>> tiny |= dict(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
        >>> CausalLM(tiny).model.num_parameters()
        10544
    """

    def __init__(self, source: str | dict[str, Any]) -> None:
        super().__init__()
        self.save_hyperparameters()
        if isinstance(source, str):
            self.model = AutoModelForCausalLM.from_pretrained(source)
        elif "model_type" in source:
            self.model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**source))
        else:
            raise ValueError(f"source needs a model_type, such as llama, beside {', '.join(source)}")
        # from_pretrained returns a model in evaluation mode, and the Trainer does not change modes.
        self.model.train()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return and log the loss in nats per token."""
        loss = self.model(input_ids=batch[0], labels=batch[0]).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the loss of the consensus."""
        loss = self.model(input_ids=batch[0], labels=batch[0]).loss
        self.log("val_loss", loss, prog_bar=True, sync_dist=True)

    def on_fit_end(self) -> None:
        """Save the model for ``from_pretrained``, in the folder of the log."""
        folder = self.trainer.log_dir  # on every rank: it broadcasts rank 0's folder
        if self.trainer.is_global_zero and folder is not None and self.trainer.checkpoint_callback is not None:
            self.model.save_pretrained(Path(folder) / "model")


class TextFile(pl.LightningDataModule):
    """A text file, cut into sequences without overlap. The last tenth validates.

    Args:
        path: The text, in UTF-8.
        tokenizer: Name or folder of a tokenizer. ``None`` takes bytes as tokens.
        context: Tokens per sequence.
        batch_size: Sequences per replica and step.

    Raises:
        ValueError: The text is shorter than ten sequences.
    """

    def __init__(self, path: str, tokenizer: str | None = None, context: int = 128, batch_size: int = 8) -> None:
        super().__init__()
        self.path, self.tokenizer = Path(path), tokenizer
        self.context, self.batch_size = context, batch_size

    def setup(self, stage: str) -> None:
        """Read, tokenise and cut the text."""
        if self.tokenizer is None:
            tokens = list(self.path.read_bytes())
        else:
            tokens = AutoTokenizer.from_pretrained(self.tokenizer)(self.path.read_text(encoding="utf-8")).input_ids
        sequences = len(tokens) // self.context
        if sequences < 10:
            raise ValueError(f"{self.path} has {len(tokens)} tokens; ten sequences of {self.context} are the least")
        cut = torch.tensor(tokens[: sequences * self.context]).view(sequences, self.context)
        held_out = sequences // 10
        self.train, self.val = TensorDataset(cut[:-held_out]), TensorDataset(cut[-held_out:])

    def train_dataloader(self) -> DataLoader[Any]:
        """Training sequences, shuffled."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation sequences, in order."""
        return DataLoader(self.val, self.batch_size)
