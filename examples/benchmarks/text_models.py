"""Text models of ``models.py``: GPT-2 and Llama of transformers, an LSTM, a mixture of experts, LoRA, a classifier."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from examples.benchmarks.compare_replica import CONTEXT, QUIET
from examples.benchmarks.corpora import CORPORA
from examples.benchmarks.model_task import Batch, ModelTask
from examples.byte_gpt import GPT, ByteGPT, StandardLibrary
from examples.hf_finetune import CausalLM

WIDTH, LAYERS, HEADS, BYTES = 64, 2, 4, 256


@cache
def write_corpus(name: str) -> None:
    """Write a corpus, which is the same for all models: once in a process."""
    CORPORA[name]().prepare_data()


class LanguageModel(ModelTask):
    """Predicts the next byte of source code."""

    length = 600
    corpus: ClassVar[str] = "python"

    def __init__(self, optimizer: Callable[[Iterable[Any]], Optimizer], steps: int) -> None:
        super().__init__(optimizer, steps)
        self.net = self.build()

    def build(self) -> nn.Module:
        """A module that maps bytes of shape (batch, time) to logits of shape (batch, time, 256)."""
        raise NotImplementedError

    def text(self) -> StandardLibrary:
        """The corpus."""
        return CORPORA[self.corpus](context=CONTEXT, batch_size=self.batch_size)

    @classmethod
    def prepare(cls, steps: int) -> None:
        """Write the corpus."""
        write_corpus(cls.corpus)

    def data(self) -> DataLoader[Any]:
        """Windows of the training files."""
        return self.text().train_dataloader()

    def held_out(self) -> Iterable[Tensor]:
        """512 windows of the validation files."""
        return self.text().val_dataloader()

    def logits_and_targets(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of all next bytes."""
        return self.net(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()


class OfTransformers(LanguageModel):
    """A model of Hugging Face transformers with random weights."""

    config: ClassVar[dict[str, Any]]

    def build(self) -> nn.Module:
        """The model of the configuration."""
        return CausalLM(self.config).model

    def logits_and_targets(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of all next bytes."""
        return self.net(input_ids=batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten()


class GPT2(OfTransformers):
    """GPT-2, whose matrices lie in ``Conv1D`` as (in, out), and whose head is tied to the embedding."""

    config: ClassVar[dict[str, Any]] = {
        "model_type": "gpt2",
        "vocab_size": BYTES,
        "n_positions": CONTEXT,
        "n_embd": WIDTH,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "bos_token_id": None,
        "eos_token_id": None,
    }


class Llama(OfTransformers):
    """Llama, with an untied head."""

    adamw_rates = (0.001, 0.002, 0.004)
    config: ClassVar[dict[str, Any]] = {
        "model_type": "llama",
        "vocab_size": BYTES,
        "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
    }


class Recurrent(nn.Module):
    """An LSTM between an embedding and a head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, width // 2)
        self.lstm = nn.LSTM(width // 2, width, batch_first=True)
        self.head = nn.Linear(width, BYTES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens of shape (batch, time) to logits of shape (batch, time, 256)."""
        return self.head(self.lstm(self.embedding(tokens))[0])


class LSTM(LanguageModel):
    """An LSTM of one layer."""

    adamw_rates = (0.004, 0.008, 0.016)
    muon_rates = (0.016, 0.032, 0.064)

    def build(self) -> nn.Module:
        """128 wide."""
        return Recurrent(2 * WIDTH)


class Experts(nn.Module):
    """MLPs of which every token passes one, weighted by its router (Fedus et al., 2021, arXiv:2101.03961).

    Attributes:
        balance: The loss of the last forward pass that keeps the experts equally busy; 1 where they are.
    """

    balance: Tensor

    def __init__(self, experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, width, hidden) * width**-0.5)
        self.down = nn.Parameter(torch.randn(experts, hidden, width) * hidden**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map (tokens, width) to the same shape."""
        shares = self.router(x).softmax(dim=1)
        weight, chosen = shares.max(dim=1)
        taken = F.one_hot(chosen, len(self.up)).to(x.dtype)
        self.balance = len(self.up) * (taken.mean(dim=0) * shares.mean(dim=0)).sum()
        # Every token passes all experts here: four small ones cost less than sorting the tokens.
        out = torch.bmm(F.gelu(torch.bmm(x.expand(len(self.up), -1, -1), self.up)), self.down)
        return torch.einsum("etw,te->tw", out, taken * weight.unsqueeze(1))


class SparseBlock(nn.Module):
    """Pre-norm transformer block with experts in place of its MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.experts = Experts(4, width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape."""
        normed = self.attention_norm(x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        x = x + self.attention(normed, normed, normed, attn_mask=mask, is_causal=True, need_weights=False)[0]
        return x + self.experts(self.mlp_norm(x).flatten(0, 1)).view_as(x)


class SparseTransformer(nn.Module):
    """Decoder-only transformer of sparse blocks, with learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(SparseBlock(WIDTH, HEADS) for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, BYTES, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens of shape (batch, time) to logits of shape (batch, time, 256)."""
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(x)))


class MixtureOfExperts(LanguageModel):
    """A mixture of four experts a block, each layer of experts one parameter of shape (4, in, out)."""

    adamw_rates = (0.004, 0.008, 0.016)
    muon_rates = (0.016, 0.032, 0.064)

    def build(self) -> nn.Module:
        """Two blocks."""
        return SparseTransformer()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Cross entropy, and a hundredth of the balance loss, as in the paper."""
        loss = F.cross_entropy(*self.logits_and_targets(batch))
        balance = [module.balance for module in self.modules() if isinstance(module, Experts)]
        return loss + 0.01 * torch.stack(balance).sum()


class LowRank(nn.Module):
    """A frozen linear layer plus a trained product of two thin ones (LoRA, Hu et al., 2021, arXiv:2106.09685)."""

    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen = frozen
        self.down = nn.Linear(frozen.in_features, rank, bias=False)
        self.up = nn.Linear(rank, frozen.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return self.frozen(x) + 2.0 * self.up(self.down(x))


class LoRA(LanguageModel):
    """Adapts a GPT that has learned Python to C++: pairs of rank 8 beside every linear layer of its blocks."""

    length = 400
    corpus = "headers"
    adamw_rates = (0.004, 0.008, 0.016)

    @classmethod
    def prepare(cls, steps: int) -> None:
        """Write both corpora, and train the GPT on Python for longer than the pairs are."""
        super().prepare(steps)
        if not cls.base(steps).exists():
            write_corpus("python")
            python = CORPORA["python"](context=CONTEXT, batch_size=2 * cls.batch_size)
            # Every method and every machine starts from the same GPT.
            pl.seed_everything(0, verbose=False)
            module = ByteGPT(layers=LAYERS, width=WIDTH, heads=HEADS, context=CONTEXT)
            pl.Trainer(**QUIET, max_steps=5 * steps // 2).fit(module, python.train_dataloader())
            torch.save(module.gpt.state_dict(), cls.base(steps))

    @staticmethod
    def base(steps: int) -> Path:
        """Where the GPT is."""
        return Path(f".data/python_gpt_{steps}.pt")

    def build(self) -> nn.Module:
        """The frozen GPT with its pairs."""
        gpt = GPT(LAYERS, WIDTH, HEADS, CONTEXT)
        gpt.load_state_dict(torch.load(self.base(self.steps)))
        gpt.requires_grad_(False)
        for block in gpt.blocks:
            for name, layer in list(block.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(block, name, LowRank(layer, rank=8))
        return gpt


class Classifier(nn.Module):
    """One encoder block over words, averaged."""

    def __init__(self, words: int, context: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, WIDTH)
        self.positions = nn.Embedding(context, WIDTH)
        self.encoder = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True, norm_first=True)
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, words: Tensor) -> Tensor:
        """Map words of shape (batch, context) to logits of shape (batch, classes)."""
        x = self.embedding(words) + self.positions(torch.arange(words.shape[1]))
        return self.head(self.encoder(x).mean(dim=1))


class TextClassifier(ModelTask):
    """Tells from 32 words of code which of eight packages it is from, after five passes over 2528 examples.

    Small, short and noisy: 101 k parameters, which learn the examples by heart, in bf16-mixed with clipped gradients.
    """

    length, batch_size = 395, 16
    adamw_rates = (0.001, 0.002, 0.004)
    # A factor of two between rates is more than between the methods, where the loss turns up again at both ends.
    muon_rates = (0.0028, 0.004, 0.0057, 0.008)
    trainer_options: ClassVar[dict[str, Any]] = {"precision": "bf16-mixed", "gradient_clip_val": 1.0}
    words, context, classes, examples, cache = 1000, 32, 8, 2528, Path(".data/packages.pt")

    def __init__(self, optimizer: Callable[[Iterable[Any]], Optimizer], steps: int) -> None:
        super().__init__(optimizer, steps)
        self.net = Classifier(self.words, self.context, self.classes)

    @classmethod
    def prepare(cls, steps: int) -> None:
        """Cut the standard library's largest packages into examples. Every fourth file of each is held out."""
        files: dict[str, list[list[str]]] = {}
        for name, path in StandardLibrary().files():
            package, _, rest = name.partition("/")
            if rest:
                text = path.read_text(encoding="utf-8", errors="replace")
                files.setdefault(package, []).append(re.findall(r"\w+|[^\w\s]", text))
        # By their last files but three, so that no class lacks held-out ones.
        packages = sorted(files, key=lambda package: -sum(map(len, files[package][3::4])))[: cls.classes]
        counts = Counter(word for package in packages for file in files[package] for word in file)
        number = {word: index for index, (word, _) in enumerate(counts.most_common(cls.words - 1), start=1)}
        order = torch.Generator().manual_seed(0)
        parts = {}
        for part, held_out in (("train", False), ("val", True)):
            examples, labels = [], []
            for label, package in enumerate(packages):
                mine = [file for index, file in enumerate(files[package]) if (index % 4 == 3) == held_out]
                words = torch.tensor([number.get(word, 0) for file in mine for word in file])
                cut = words[: len(words) // cls.context * cls.context].view(-1, cls.context)
                chosen = torch.randperm(len(cut), generator=order)[: cls.examples // cls.classes]
                examples.append(cut[chosen])
                labels.append(torch.full((len(chosen),), label))
            parts[part] = torch.cat(examples), torch.cat(labels)
        cls.cache.parent.mkdir(exist_ok=True)
        torch.save(parts, cls.cache)

    def data(self) -> DataLoader[Any]:
        """The examples, shuffled."""
        return DataLoader(TensorDataset(*torch.load(self.cache)["train"]), self.batch_size, shuffle=True)

    def held_out(self) -> Iterable[Batch]:
        """Examples from other files."""
        return DataLoader(TensorDataset(*torch.load(self.cache)["val"]), 256)

    def logits_and_targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits of the packages."""
        return self.net(batch[0]), batch[1]
