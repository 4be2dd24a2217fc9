"""Which layers hold matrices, in which layout, and which layer is the output head."""

import pytest
import torch
from module_kinds import KINDS, OF_TRANSFORMERS, Attention, Classifier, LanguageModel
from torch import nn

from lightning_curvadion import CurvaDion, split_parameters


def groups_of(kind):
    torch.manual_seed(0)
    return split_parameters(KINDS[kind]()[0])


def shapes(groups):
    return {group["name"]: [tuple(p.shape) for _, p in group["params"]] for group in groups}


def layouts(groups):
    """(flatten, transposed) of the groups of matrices."""
    return {
        group["name"]: (group.get("flatten", False), group.get("transposed", False))
        for group in groups
        if group["algorithm"] == "dion"
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_group_that_trains_it_or_is_left_out(kind):
    if kind in OF_TRANSFORMERS:
        pytest.importorskip("transformers")
    model, batch = KINDS[kind]()
    groups = split_parameters(model)
    grouped = [p for group in groups for _, p in group["params"]]
    assert len(grouped) + len(groups.left_out) == len(list(model.parameters()))
    optimizer = CurvaDion(groups, lr=0.1)
    before = {name: p.detach().clone() for name, p in optimizer.named_parameters()}
    (model(batch) - 1).square().mean().backward()
    optimizer.step()
    for name, parameter in optimizer.named_parameters():
        trained = parameter.requires_grad and parameter.numel() > 0 and parameter.grad.abs().max() > 0
        assert torch.equal(parameter, before[name]) != trained, name


def test_kernels_are_matrices_but_for_depthwise_ones():
    groups = groups_of("images")
    assert shapes(groups)["convolutions"] == [(8, 1, 3, 3), (8, 4, 3, 3)], "one input channel is not depthwise"
    assert shapes(groups)["depthwise convolutions"] == [(8, 1, 3, 3)]
    assert layouts(groups) == {"convolutions": (True, False)}
    assert layouts(groups_of("sound")) == {"convolutions": (True, False), "transposed convolutions": (True, True)}
    assert set(shapes(groups_of("volumes"))) == {"convolutions", "transposed convolutions", "biases"}


def test_convolutions_can_go_back_to_adamw():
    model, _ = KINDS["images"]()
    groups = split_parameters(model, options={"convolutions": {"algorithm": "adamw"}, "adamw": {"lr": 0.1}})
    (kernels,) = [group for group in groups if group["name"] == "convolutions"]
    assert kernels["algorithm"] == "adamw" and kernels["lr"] == 0.1
    assert "a kernel is one matrix" not in str(groups)


def test_experts_are_stored_inputs_first_unless_their_layer_says_otherwise():
    groups = groups_of("experts")
    assert shapes(groups)["transposed matrices"] == [(3, 4, 8), (3, 8, 4)]
    assert layouts(groups) == {"matrices": (False, False), "transposed matrices": (False, True)}
    assert (3, 1, 8) in shapes(groups)["biases"]


@pytest.mark.parametrize(("kind", "role"), [("mixtral", "matrices"), ("gpt_oss", "transposed matrices")])
def test_experts_of_transformers_in_both_layouts(kind, role):
    pytest.importorskip("transformers")
    experts = [shape for shape in shapes(groups_of(kind))[role] if len(shape) == 3]
    assert experts == ([(3, 16, 16), (3, 16, 8)] if kind == "mixtral" else [(3, 16, 16), (3, 8, 16)])


@pytest.mark.parametrize(("up", "down", "role"), [
    ((3, 32, 8), (3, 8, 16), "matrices"), ((3, 8, 32), (3, 16, 8), "transposed matrices"),
])  # fmt: skip
def test_fused_experts_that_do_not_say_show_it_by_their_shapes(up, down, role):
    layer = nn.Module()
    layer.gate_up_proj, layer.down_proj = nn.Parameter(torch.zeros(up)), nn.Parameter(torch.zeros(down))
    assert shapes(split_parameters(layer)) == {role: [up, down]}


def test_a_gpt2_of_transformers():
    pytest.importorskip("transformers")
    groups = groups_of("gpt2")
    packed, transposed = "transposed packed matrices", "transposed matrices"
    assert set(shapes(groups)) == {transposed, packed, "embeddings", "norms", "biases"}
    assert shapes(groups)[packed] == [(16, 48)] * 2
    assert set(shapes(groups)[transposed]) == {(16, 16), (16, 64), (64, 16)}
    assert layouts(groups) == {transposed: (False, True), packed: (False, True)}
    whole = split_parameters(KINDS["gpt2"]()[0], options={"dion": {"packed": 1}})
    assert layouts(whole) == {transposed: (False, True)} and len(shapes(whole)[transposed]) == 8


class Fused(nn.Module):
    """A linear layer of some name in an attention."""

    def __init__(self, name, inputs=8, outputs=24):
        super().__init__()
        setattr(self, name, nn.Linear(inputs, outputs, bias=False))
        self.out = nn.Linear(8, 8, bias=False)


@pytest.mark.parametrize("name", ["qkv", "to_qkv", "c_attn", "Wqkv"])
def test_a_layer_that_packs_queries_keys_and_values_is_taken_apart(name):
    groups = split_parameters(nn.ModuleList([Fused(name), Fused(name)]))
    assert shapes(groups) == {"matrices": [(8, 8)] * 2, "packed matrices": [(24, 8)] * 2}
    assert {group["name"]: group.get("packed", 1) for group in groups} == {"matrices": 1, "packed matrices": 3}
    # Compiled, parametrized or by itself, and a layer with grouped queries.
    parts = Fused(name)
    setattr(parts, name, torch.compile(getattr(parts, name), backend="eager"))
    assert shapes(split_parameters(parts))["packed matrices"] == [(24, 8)]
    parts = Fused(name)
    nn.utils.parametrizations.weight_norm(getattr(parts, name))
    assert shapes(split_parameters(parts))["packed matrices"] == [(24, 8)]
    assert "packed matrices" not in shapes(split_parameters(Fused(name, outputs=16)))


@pytest.mark.parametrize("name", ["query_key_value", "qkv_proj", "in_proj", "fc"])
def test_a_layer_that_may_interleave_them_or_holds_something_else_stays_whole(name):
    assert set(shapes(split_parameters(nn.ModuleList([Fused(name), Fused(name)])))) == {"matrices"}


@pytest.mark.parametrize("model_type", ["gpt_neox", "bloom", "phi3", "gpt_bigcode"])
@pytest.mark.parametrize("multi_query", [False, True])
def test_interleaved_and_grouped_projections_of_transformers_stay_whole(model_type, multi_query):
    pytest.importorskip("transformers")
    config = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if model_type == "gpt_bigcode":
        config["multi_query"] = multi_query
    elif multi_query:
        config |= {"num_key_value_heads": 1}
    model = LanguageModel(model_type=model_type, intermediate_size=32, pad_token_id=0, **config)
    fused = [name for name, p in model.named_parameters() if p.dim() == 2 and p.shape[0] in (20, 24, 32, 48)]
    assert any(name.endswith(("query_key_value.weight", "qkv_proj.weight", "c_attn.weight")) for name in fused)
    assert "packed matrices" not in shapes(split_parameters(model))


def test_keys_and_values_of_a_cross_attention_are_a_pair():
    pytest.importorskip("transformers")
    config = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8, "add_cross_attention": True}
    groups = split_parameters(LanguageModel(model_type="gpt2", bos_token_id=None, eos_token_id=None, **config))
    packed = {group["name"]: (group["packed"], group["transposed"]) for group in groups if "packed" in group}
    assert packed == {"transposed packed matrices": (3, True), "transposed packed pairs": (2, True)}
    assert shapes(groups)["transposed packed pairs"] == [(16, 32)]
    assert shapes(groups)["transposed packed matrices"] == [(16, 48)]
    CurvaDion(groups).init_state()


def test_a_convolution_that_is_called_conv1d_elsewhere_is_not_transformers():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 6))

    assert shapes(split_parameters(Conv1D())) == {"other parameters": [(4, 6)]}


def test_pairs_of_lora_are_matrices_and_never_the_head():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3), KINDS["lora"]()[0][0])
    names = {group["name"]: [name for name, _ in group["params"]] for group in split_parameters(model)}
    assert {"2.lora_A.default.weight", "2.lora_B.default.weight"} <= set(names["matrices"])
    assert names["output head"] == ["2.base_layer.weight"], "the last linear layer of the model, adapted"


def test_a_parametrized_weight_is_treated_like_the_weight():
    for kind, lengths in (("parametrized", [(8, 1), (4, 1, 1)]), ("parametrized_by_hooks", [(8, 1), (4, 1, 1)])):
        found = shapes(groups_of(kind))
        assert found["norms"] == lengths
        assert found["convolutions"] == [(4, 2, 2)] and found["output head"] == [(3, 12)]
        assert set(found["matrices"]) == {(8, 6), (8, 8)}


def test_reading_the_roles_leaves_a_spectral_norm_as_it_is():
    model, _ = KINDS["parametrized"]()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    split_parameters(nn.Sequential(nn.Embedding(8, 8), model))
    assert before and all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_compiled_and_quantization_aware_layers_are_those_they_stand_for():
    assert shapes(groups_of("compiled")) == shapes(groups_of("images"))
    found = shapes(groups_of("quantization_aware"))
    assert found["convolutions"] == [(4, 1, 3, 3), (4, 4, 3, 3)]
    assert found["matrices"] == [(6, 4)] and found["output head"] == [(3, 6)]


def test_the_classifier_behind_convolutions_is_the_head_and_a_layer_before_them_is_not():
    assert shapes(groups_of("images"))["output head"] == [(3, 8)]
    assert "output head" not in shapes(groups_of("generator"))
    assert "output head" not in shapes(split_parameters(nn.Linear(4, 3)))


def test_the_output_projection_of_an_attention_is_not_the_head():
    stem = nn.Sequential(nn.Linear(8, 8), Attention())
    assert "output head" not in shapes(split_parameters(stem))
    assert shapes(split_parameters(Classifier(stem, 40)))["output head"] == [(3, 40)]


def test_the_head_of_a_sequence_classifier_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = LanguageModel(model_type="gpt2", vocab_size=32, n_embd=16, n_layer=1, n_head=2).model.config
    config.num_labels = 5
    assert shapes(split_parameters(transformers.GPT2ForSequenceClassification(config)))["output head"] == [(5, 16)]


def test_what_has_no_elements_trains_nothing_and_frozen_codes_are_left_out():
    groups = groups_of("codes")
    assert shapes(groups)["other parameters"] == [(6, 0)]
    assert list(groups.left_out) == ["1.codes"]
    assert "frozen, in a dtype that no step could train" in str(groups)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
def test_what_cannot_be_trained_is_an_error_unless_it_is_frozen(dtype):
    model = nn.Linear(4, 3)
    model.codes = nn.Parameter(torch.zeros(3, dtype=dtype), requires_grad=False)
    assert list(split_parameters(model).left_out) == ["codes"]
    model.codes.requires_grad_()
    with pytest.raises(ValueError, match=rf"codes is {dtype}"):
        CurvaDion(split_parameters(model))


def test_a_lazy_module_says_that_it_needs_a_batch():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    with pytest.raises(
        ValueError, match=r"0\.weight has no shape yet, as a parameter of a lazy module: send one batch"
    ):
        split_parameters(model)
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 has no shape yet"):
        CurvaDion([{"params": list(model.parameters()), "algorithm": "adamw"}])
    model(torch.zeros(1, 6))
    assert shapes(split_parameters(model))["matrices"] == [(4, 6)]
