"""A small model for each kind of module that split_parameters knows, with a batch that it takes."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

KINDS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {}
OF_TRANSFORMERS = ("gpt2", "mixtral", "gpt_oss")


def kind(build: Callable[[], tuple[nn.Module, Tensor]]) -> Callable[[], tuple[nn.Module, Tensor]]:
    KINDS[build.__name__] = build
    return build


class Classifier(nn.Module):
    """A body whose outputs, flattened, go to a linear layer."""

    def __init__(self, body: nn.Module, features: int) -> None:
        super().__init__()
        self.body, self.fc = body, nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).flatten(1))


@kind
def images():
    body = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 8, 3, groups=2),
    )
    return Classifier(body, 8), torch.randn(4, 1, 11, 11)


@kind
def channels_last():
    model, batch = images()
    return model.to(memory_format=torch.channels_last), batch


@kind
def sound():
    body = nn.Sequential(nn.Conv1d(2, 4, 5), nn.ReLU(), nn.ConvTranspose1d(4, 2, 3))
    return Classifier(body, 12), torch.randn(4, 2, 8)


@kind
def volumes():
    return nn.Sequential(nn.Conv3d(1, 4, 2), nn.ConvTranspose3d(4, 1, 2)), torch.randn(2, 1, 4, 4, 4)


@kind
def generator():
    model = nn.Sequential(nn.Linear(6, 16), nn.Unflatten(1, (4, 2, 2)), nn.ConvTranspose2d(4, 3, 4, stride=2))
    return model, torch.randn(4, 6)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 4, 8)), nn.Parameter(torch.randn(3, 8, 4))
        self.up_bias = nn.Parameter(torch.zeros(3, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(torch.tanh(torch.bmm(x, self.up) + self.up_bias), self.down)


@kind
def experts():
    return nn.Sequential(Experts(), nn.Linear(4, 4)), torch.randn(3, 5, 4)


class LowRank(nn.Module):
    """A layer of peft."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(8, 6).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 6, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


@kind
def lora():
    return nn.Sequential(LowRank(), nn.ReLU(), nn.Linear(6, 8), LowRank()), torch.randn(4, 8)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@kind
def attention():
    return Classifier(Attention(), 40), torch.randn(4, 5, 8)


class FusedAttention(nn.Module):
    """An attention whose queries, keys and values are one linear layer, as in timm."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        return self.proj(nn.functional.scaled_dot_product_attention(query, key, value))


@kind
def fused_attention():
    return Classifier(FusedAttention(), 40), torch.randn(4, 5, 8)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTM(4, 6, proj_size=5), nn.GRU(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(self.lstm(x)[0])[0]


@kind
def recurrent():
    return Recurrent(), torch.randn(7, 2, 4)


@kind
def parametrized():
    body = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(6, 8)),
        parametrizations.spectral_norm(nn.Linear(8, 8)),
        parametrizations.orthogonal(nn.Linear(8, 8)),
        nn.Unflatten(1, (2, 4)),
        parametrizations.weight_norm(nn.Conv1d(2, 4, 2)),
    )
    return Classifier(body, 12), torch.randn(5, 6)


@kind
def parametrized_by_hooks():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        linear, kernel = nn.utils.weight_norm(nn.Linear(6, 8)), nn.utils.weight_norm(nn.Conv1d(2, 4, 2))
    body = nn.Sequential(linear, nn.utils.spectral_norm(nn.Linear(8, 8)), nn.Unflatten(1, (2, 4)), kernel)
    return Classifier(body, 12), torch.randn(5, 6)


@kind
def compiled():
    model, batch = images()
    return torch.compile(model, backend="eager"), batch


@kind
def quantization_aware():
    from torch.ao import quantization
    from torch.ao.nn import qat
    from torch.ao.nn.intrinsic.qat import ConvBn2d

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"qconfig": quantization.get_default_qat_qconfig("fbgemm")}
        body = nn.Sequential(ConvBn2d(1, 4, 3, **options), qat.Conv2d(4, 4, 3, **options))
    return nn.Sequential(body, nn.Flatten(), qat.Linear(4, 6, **options), nn.Linear(6, 3)), torch.randn(4, 1, 5, 5)


class Codes(nn.Module):
    """A layer that adds a frozen table of integer codes, and holds a parameter that a setting has left empty."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.arange(6, dtype=torch.int8), requires_grad=False)
        self.empty = nn.Linear(0, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.codes + self.empty(x[:, :0])


@kind
def codes():
    return nn.Sequential(nn.Linear(4, 6), Codes(), nn.Linear(6, 3)), torch.randn(4, 4)


class LanguageModel(nn.Module):
    """A model of transformers, which returns its logits."""

    def __init__(self, **config: object) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens).logits


def tokens() -> Tensor:
    return torch.randint(0, 32, (2, 6))


@kind
def gpt2():
    config = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8}
    return LanguageModel(model_type="gpt2", bos_token_id=None, eos_token_id=None, **config), tokens()


_MIXTURE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "head_dim": 8,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


@kind
def mixtral():
    return LanguageModel(model_type="mixtral", **_MIXTURE), tokens()


@kind
def gpt_oss():
    return LanguageModel(model_type="gpt_oss", **_MIXTURE), tokens()
