"""split_parameters: what goes where."""

import pytest
import torch
from torch import nn

from lightning_curvadion import CurvaDion, split_parameters


def names(groups):
    return {group["name"]: [name for name, _ in group["params"]] for group in groups}


class Transformer(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.position = nn.Parameter(torch.zeros(8, 16))
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2)
        # The head comes before the norm here: found by use, not by place or name.
        self.to_bytes = nn.Linear(16, 50, bias=False)
        self.norm = nn.LayerNorm(16)
        self.pool = nn.Linear(16, 16)
        if tied:
            self.to_bytes.weight = self.embedding.weight


def test_a_transformer_with_an_untied_head():
    split = names(split_parameters(Transformer(tied=False)))
    assert split["matrices"] == [
        f"encoder.layers.{i}.{name}.weight" for i in range(2) for name in ("self_attn.out_proj", "linear1", "linear2")
    ] + ["pool.weight"]
    assert split["packed matrices"] == [f"encoder.layers.{i}.self_attn.in_proj_weight" for i in range(2)]
    assert split["embeddings"] == ["embedding.weight"]
    assert split["output head"] == ["to_bytes.weight"]
    assert split["other parameters"] == ["position"]
    assert {"norm.weight", "norm.bias", "encoder.layers.0.norm1.weight"} <= set(split["norms"])
    assert {"pool.bias", "encoder.layers.1.self_attn.in_proj_bias"} <= set(split["biases"])


def test_a_tied_head_is_one_parameter_and_no_matrix():
    groups = split_parameters(Transformer(tied=True))
    split = names(groups)
    assert split["embeddings"] == ["embedding.weight"]
    assert not any("to_bytes" in name for members in split.values() for name in members)
    assert sum(len(members) for members in split.values()) == len(list(Transformer(True).parameters()))


def test_a_tied_head_that_is_defined_first():
    class HeadFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 30, bias=False)
            self.body = nn.Linear(8, 8)
            self.table = nn.Embedding(30, 8)
            self.table.weight = self.head.weight

    assert names(split_parameters(HeadFirst()))["matrices"] == ["body.weight"]


def test_a_classifier_and_convolutions():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10)
    )
    split = names(split_parameters(model))
    assert split["convolutions"] == ["0.weight"]
    assert split["norms"] == ["1.weight", "1.bias"]
    assert split["matrices"] == ["4.weight"]
    assert split["output head"] == ["6.weight"]
    assert split["biases"] == ["0.bias", "4.bias", "6.bias"]


def test_an_encoder_without_a_head_keeps_all_its_matrices():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 3)
    assert "output head" not in names(split_parameters(encoder))


def test_recurrent_layers_and_unpacked_attention():
    model = nn.ModuleDict({"rnn": nn.LSTM(8, 4), "attention": nn.MultiheadAttention(8, 2, kdim=4, vdim=4)})
    split = names(split_parameters(model))
    assert split["matrices"] == ["rnn.weight_ih_l0", "rnn.weight_hh_l0"] + [
        f"attention.{name}" for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
    ]


def test_packed_matrices_can_stay_whole_as_states_from_before_expect():
    model = Transformer(tied=False).encoder
    whole = split_parameters(model, options={"dion": {"packed": 1}})
    assert len(names(whole)["matrices"]) == 8 and "packed matrices" not in names(whole)
    before = CurvaDion(whole)
    before.init_state()
    message = (
        r"with other parameter groups: matrices \(dion, 8\), .* Here: matrices \(dion, 6\), packed.*leaves the last"
    )
    with pytest.raises(ValueError, match=message):
        CurvaDion(split_parameters(model)).load_state_dict(before.state_dict())
    again = CurvaDion(split_parameters(model, options={"dion": {"packed": 1}}))
    again.load_state_dict(before.state_dict())
    slower = split_parameters(model, options={"packed matrices": {"packed": 1, "lr": 0.1}})
    assert len(names(slower)["packed matrices"]) == 2, "another rate, so a group of its own"
    assert "each a matrix" in str(split_parameters(model)) and "each a matrix" not in str(slower)
    one = split_parameters(model, {"*.in_proj_weight": {"packed": 1}})
    assert len(names(one)["*.in_proj_weight (packed matrices)"]) == 2


def test_overrides_by_name_pattern():
    model = Transformer(tied=False)
    groups = split_parameters(
        model, {"position": "lion", "*.linear1.weight": {"rank_fraction": 0.5}, "pool.*": "adamw"}
    )
    split = names(groups)
    by_name = {group["name"]: group for group in groups}
    assert split["position (other parameters)"] == ["position"]
    assert by_name["position (other parameters)"]["algorithm"] == "lion"
    assert split["pool.* (matrices)"] == ["pool.weight"] and split["pool.* (biases)"] == ["pool.bias"]
    wide = "*.linear1.weight (matrices)"
    assert split[wide] == ["encoder.layers.0.linear1.weight", "encoder.layers.1.linear1.weight"]
    assert by_name[wide]["algorithm"] == "dion" and by_name[wide]["rank_fraction"] == 0.5
    assert sum(map(len, split.values())) == len(list(model.parameters()))
    CurvaDion(groups)


def test_a_wrong_override_says_so():
    with pytest.raises(
        ValueError, match=r"overrides\['hed\.\*'\] matches no parameter; names are such as position, embedding\.weight"
    ):
        split_parameters(Transformer(False), {"hed.*": "adamw"})
    with pytest.raises(ValueError, match="must be one of 'dion', 'adamw', 'lion', not 'sgd'"):
        split_parameters(Transformer(False), {"pool.*": "sgd"})


def test_groups_print_what_went_where():
    shown = str(split_parameters(Transformer(tied=False)))
    for expected in ("matrices", "dion", "output head", "encoder.layers.*.linear1.weight", "a row is a lookup"):
        assert expected in shown


def test_every_parameter_is_trained_once_by_a_valid_group():
    for model in (Transformer(True), Transformer(False), nn.Linear(3, 2), nn.LSTM(4, 4)):
        optimizer = CurvaDion(split_parameters(model))
        assert {id(p) for _, p in optimizer.named_parameters()} == {id(p) for p in model.parameters()}
