"""Settings of the hook: bad ones, and one to warn of."""

import warnings

import pytest
import torch
from torch import nn

from lightning_curvadion import CurvaDion, CurvaDionStrategy, ProcessGroupSync
from lightning_curvadion.sync.settings import has_small_groups


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"consensus": "mean"}, "consensus must be one of 'average', 'factors', 'none', not 'mean'"),
        ({"momentum": "all"}, "momentum must be one of"),
        ({"wire_format": "fp8"}, "wire_format must be one of 'float32', .*'sign', not 'fp8'"),
        ({"outer_lr": 0.0}, "outer_lr must be > 0"),
        ({"outer_momentum": 1.0}, r"outer_momentum must be in \[0, 1\)"),
        ({"consensus": "none", "outer_lr": 0.5}, 'an outer step needs consensus="average"'),
        ({"consensus": "none", "momentum": "local"}, 'consensus="none" implies momentum="dion"'),
        ({"factor_format": "int1"}, "factor_format must be one of 'float32', .*, not 'int1'"),
        ({"residual_dtype": "float16"}, "residual_dtype must be one of 'float32', 'bfloat16', not 'float16'"),
        ({"sync_rank_fraction": 0.0}, r"sync_rank_fraction must be in \(0, 1\]"),
        ({"sync_rank_fraction": 0.1, "momentum": "local"}, 'is the rank of what momentum="factors" sends'),
        ({"sync_rank_fraction": 0.1, "consensus": "none"}, 'is the rank of what momentum="factors" sends'),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"vector_format": "int3"}, "vector_format must be one of 'float32', .*, not 'int3'"),
        ({"spread": 0}, "spread must be at least 1 sync step, not 0"),
        ({"spread": 2, "momentum": "factors"}, 'spread needs consensus="average" with momentum='),
        ({"spread": 2, "consensus": "none"}, 'spread needs consensus="average" with momentum='),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ProcessGroupSync(**options)


@pytest.mark.parametrize("factor_format", ["int2", "sign"])
def test_a_whole_momentum_in_two_bits_is_warned_of(factor_format):
    with pytest.warns(UserWarning, match=f"a whole momentum in {factor_format} is known to hurt"):
        ProcessGroupSync(momentum="average", wire_format="int2", factor_format=factor_format)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ProcessGroupSync(momentum="average", wire_format="int2")
        ProcessGroupSync(momentum="factors", wire_format="int2", factor_format=factor_format)


def test_residual_dtype_is_a_name_or_a_dtype():
    assert ProcessGroupSync(residual_dtype=torch.bfloat16).settings.residual_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("sign", "sign", "int8", "displacement", "int4")),
        ({"wire_format": "int4"}, ("int4", "int4", "int8", "displacement", "int4")),
        ({"wire_format": "bfloat16"}, ("bfloat16", "bfloat16", "bfloat16", "displacement", "bfloat16")),
        ({"vector_format": "int4"}, ("sign", "int4", "int4", "displacement", "int4")),
        ({"consensus": "factors"}, ("float32", "float32", "float32", "factors", "float32")),
        ({"consensus": "none"}, ("float32", "float32", "float32", "dion", "float32")),
    ],
)
def test_the_hook_and_the_strategy_have_the_same_defaults(given, expected):
    *formats, momentum, factor_format = expected
    for settings in (ProcessGroupSync(**given).settings, CurvaDionStrategy(**given).sync.settings):
        assert (settings.momentum, settings.factor_format) == (momentum, factor_format)
        matrix, bias, last_row = torch.zeros(4, 4), torch.zeros(4), torch.zeros(1, 4)
        chosen = [settings.format_of(matrix, matrix=True, in_small_groups=True)]
        chosen += [settings.format_of(parameter, matrix=False, in_small_groups=False) for parameter in (matrix, bias)]
        assert chosen == formats
        for like_a_bias, in_small_groups in ((last_row, False), (matrix, True)):
            assert settings.format_of(like_a_bias, matrix=False, in_small_groups=in_small_groups) == formats[-1]


@pytest.mark.parametrize(("rows", "small"), [(2**8 - 1, True), (2**8, False)])
@pytest.mark.parametrize("algorithm", ["adamw", "lion"])
def test_groups_are_small_by_the_numbers_of_them_all(rows, small, algorithm):
    embedding, norm, matrix = nn.Embedding(rows, 64), nn.LayerNorm(32), nn.Linear(200, 200, bias=False)
    # Frozen numbers count, or what travels how would change in the middle of a run.
    norm.requires_grad_(False)
    groups = [
        {"params": embedding.parameters(), "algorithm": algorithm},
        {"params": norm.parameters(), "algorithm": "adamw"},
        {"params": matrix.parameters()},
    ]
    assert has_small_groups(CurvaDion(groups)) == small


def test_parameters_in_float64_travel_at_full_width_by_default():
    optimizer = CurvaDion([nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))])
    settings = ProcessGroupSync().settings_for(optimizer)
    assert settings.wire_format == settings.embedding_format == settings.small_format == "float32"
