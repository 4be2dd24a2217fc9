"""Numbers that cannot be quantized are found in whatever a payload is made of."""

import math

import pytest
import torch

from lightning_curvadion.sync.payload_checks import PayloadCheck
from lightning_curvadion.sync.payloads import DisplacementPayload, FactorPayload, TensorPayload


def payloads(**changed):
    """A displacement, a tensor of another dtype, and a factor; ``changed`` gives one number of a part."""
    parts = {
        "parameter": torch.ones(3, 4),
        "anchor": torch.ones(3, 4),
        "residual": torch.ones(3, 4),
        "narrow": torch.ones(5, dtype=torch.bfloat16),
        "factor": torch.ones(2, 4, 3),
    }
    for name, value in changed.items():
        parts[name].view(-1)[-1] = value
    displacement = DisplacementPayload(
        "displaced", parts["parameter"], parts["anchor"], "int4", parts["residual"], outer_step=None
    )
    narrow = TensorPayload("narrow", parts["narrow"], "int4")
    return [displacement, narrow, FactorPayload("factor", parts["factor"], "int4")]


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e30])
@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("parameter", "displacement of displaced"),
        ("anchor", "displacement of displaced"),
        ("residual", "displacement of displaced"),
        ("narrow", "narrow"),
        ("factor", "factor"),
    ],
)
def test_a_number_that_cannot_be_quantized_is_found_in_every_part(part, name, value):
    check = PayloadCheck(payloads(**{part: value}))
    assert check.take_flag().tolist() == [1] and check.first_unusable() == name
    assert check.take_flag().numel() == 0, "the flag travels once"


def test_finite_numbers_pass_also_where_their_norm_is_too_large_for_their_dtype():
    large = TensorPayload("large", torch.full((100,), 60_000.0, dtype=torch.float16), "int4")
    check = PayloadCheck([*payloads(parameter=1e17), large])
    assert check.take_flag().tolist() == [0] and check.first_unusable() is None


@pytest.mark.parametrize(("value", "flag"), [(2.0**57, 0), (2.0**59, 1)])
def test_numbers_are_too_large_long_before_a_sum_of_their_squares_overflows(value, flag):
    assert PayloadCheck(payloads(parameter=value)).take_flag().tolist() == [flag]
