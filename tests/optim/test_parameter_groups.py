"""Bad options and parameters of groups."""

import pytest
import torch
from models import matrix
from torch import nn

from lightning_curvadion import CurvaDion


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
