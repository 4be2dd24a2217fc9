"""Bad options and parameters of groups."""

import pytest
import torch
from models import matrix
from torch import nn

from lightning_curvadion import CurvaDion, split_parameters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_fraction": 0.0}, r"rank_fraction must be in \(0, 1\]"),
        ({"rank_fraction": 1.5}, r"rank_fraction must be in \(0, 1\]"),
        ({"mu": 1.0}, r"mu must be in \[0, 1\)"),
        ({"mu": -0.1}, r"mu must be in \[0, 1\)"),
        ({"lr": -1.0}, "lr must be a finite number >= 0"),
        ({"lr": float("nan")}, "lr must be a finite number >= 0"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"eps": -1.0}, "eps must be"),
        ({"betas": (0.9, 1.0)}, "betas must be"),
        ({"local_update": "sgd"}, 'local_update="sgd" needs local_lr'),
        ({"local_update": "sgd", "local_lr": -1.0}, "local_lr must be"),
        ({"flatten": 1}, "flatten must be True or False, not 1"),
        ({"transposed": "yes"}, "transposed must be True or False, not 'yes'"),
        ({"packed": 0}, "packed must be an integer >= 1, the number of matrices in a parameter, not 0"),
        ({"packed": True}, "packed must be an integer >= 1"),
        ({"packed": 1.5}, "packed must be an integer >= 1"),
        ({"lr_scale": "rms"}, "lr_scale must be one of 'spectral', 'match_rms_adamw', not 'rms'"),
        ({"local_update": "adam"}, "local_update must be one of 'muon', 'dion', 'sgd', not 'adam'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        CurvaDion([{"params": [matrix()], **options}])


def test_bad_parameters():
    with pytest.raises(ValueError, match="empty parameter list"):
        CurvaDion([])
    with pytest.raises(ValueError, match="algorithm must be one of 'dion', 'adamw', 'lion', not 'muon'"):
        CurvaDion([{"params": [matrix()], "algorithm": "muon"}])
    with pytest.raises(ValueError, match=r'parameter 1 of group 0 has shape \(3,\), but algorithm="dion".*"adamw"'):
        CurvaDion([matrix(), nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match=r"bias has shape \(3,\)"):
        CurvaDion([("bias", nn.Parameter(torch.zeros(3)))])
    with pytest.raises(ValueError, match="complex64; only real"):
        CurvaDion([nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))])
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        for algorithm in ("dion", "adamw"):
            with pytest.raises(ValueError, match=rf"weight is {dtype}.* keep it in bfloat16 or float32"):
                CurvaDion([{"params": [("weight", nn.Parameter(torch.zeros(2, 2).to(dtype)))], "algorithm": algorithm}])


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((8, 3), {}, r"qkv has shape \(8, 3\), whose 8 outputs are not 3 matrices of one size: leave packed=1"),
        ((3, 8), {"transposed": True}, "whose 8 outputs are not 3"),
        ((8, 3, 3), {"flatten": True}, "whose 8 outputs are not 3"),
        ((3, 8, 3), {"flatten": True, "transposed": True}, "whose 8 outputs are not 3"),
        ((3, 8, 3), {}, "whose 8 outputs are not 3"),
        ((3, 8, 9), {"transposed": True}, r"a batch of matrices stored \(fan in, fan out\).* leave packed=1"),
    ],
)
def test_matrices_that_cannot_be_taken_apart(shape, options, message):
    with pytest.raises(ValueError, match=message):
        CurvaDion([{"params": [("qkv", matrix(*shape))], "packed": 3, **options}])
    vectors = {"params": [matrix(*shape)], "algorithm": "adamw", "packed": 3}
    assert CurvaDion([vectors]).param_groups[0]["packed"] == 3, "it says nothing of AdamW"


def image_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))


def old_groups(model):
    """As split_parameters made them in version 0.1.0."""
    kernel, kernel_bias, scale, shift, head, head_bias = model.named_parameters()
    return [
        {"name": "matrices", "params": [head]},
        {"name": "convolutions", "algorithm": "adamw", "params": [kernel]},
        {"name": "norms", "algorithm": "adamw", "weight_decay": 0.0, "params": [scale, shift]},
        {"name": "biases", "algorithm": "adamw", "weight_decay": 0.0, "params": [kernel_bias, head_bias]},
    ]


def test_a_state_of_the_same_parameters_continues_with_the_algorithms_it_was_saved_with():
    model = image_model()
    before, after = CurvaDion(old_groups(model)), CurvaDion(split_parameters(model))
    model(torch.randn(8, 1, 8, 8)).square().mean().backward()
    before.step()
    after.load_state_dict(before.state_dict())
    assert [group["algorithm"] for group in after.param_groups] == ["dion", "adamw", "adamw", "adamw"]
    assert torch.equal(after.state[model[3].weight]["momentum"], before.state[model[3].weight]["momentum"])
    after.step()


def optimizer_of(chosen, named=True):
    groups = old_groups(image_model())
    if not named:
        groups = [{**group, "params": [parameter for _, parameter in group["params"]]} for group in groups]
    optimizer = CurvaDion([groups[index] for index in chosen])
    optimizer.init_state()
    return optimizer


@pytest.mark.parametrize("named", [True, False])
def test_a_state_of_other_groups_is_refused_with_both_lists(named):
    saved = optimizer_of([1, 2, 3], named).state_dict()
    message = r"saved with other parameter groups: convolutions \(adamw, 1\), .* Here: matrices \(dion, 1\)"
    with pytest.raises(ValueError, match=message):
        optimizer_of(range(4), named).load_state_dict(saved)
    optimizer_of([1, 2, 3], named).load_state_dict(saved)


def test_a_state_whose_groups_are_as_large_but_not_the_same_is_refused():
    with pytest.raises(ValueError, match="saved with other parameter groups"):
        optimizer_of([0, 1, 3, 2]).load_state_dict(optimizer_of(range(4)).state_dict())


def test_a_state_of_parameters_that_were_renamed_since_loads():
    # As by torch.compile.
    model = torch.compile(image_model())
    assert all(name.startswith("_orig_mod.") for name, _ in model.named_parameters())
    CurvaDion(old_groups(model)).load_state_dict(optimizer_of(range(4)).state_dict())
