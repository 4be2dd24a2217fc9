"""``tests/gpu/check_device.py``, in its short form."""

import re
import sys

import check_device
import pytest
import torch
from ahead import ahead
from launching import outputs, start


def short_form(device):
    """What it prints."""
    (printed,) = outputs(start(sys.executable, check_device.__file__, "--smoke", "--device", device))
    return printed


@ahead
def on_the_cpu(folder):
    return short_form("cpu")


def test_the_short_form_prints_all_parts(on_the_cpu):
    check_parts(on_the_cpu, many_layers=4)


@pytest.mark.gpu
def test_the_short_form_prints_all_parts_on_a_gpu():
    check_parts(short_form("cuda"), many_layers=12)


def check_parts(printed, many_layers):
    for update in check_device.LARGEST_DIFFERENCE:
        assert len(re.findall(rf"^  {update} +(local|sync steps in int4) +\d\.\d+ ", printed, re.MULTILINE)) == 2
    for step in check_device.STEPS:
        assert len(re.findall(rf"^  {re.escape(step)} +\d+\.\d+ +\d+\.\d+ +\d+\.\d+$", printed, re.MULTILINE)) == 2
    for layers in (2, many_layers):
        assert len(re.findall(rf"^  (?:local|sync|sync, factors) +{layers} layers", printed, re.MULTILINE)) == 3
    # Between them are lines of the profiler's own.
    assert re.search(r"^overlap: \d processes on (?s:.*)^phase", printed, re.MULTILINE)
    assert re.search(r"^collectives took \S+% of the time; \S+% beside computation$", printed, re.MULTILINE)


def test_a_device_that_trains_another_model_is_an_error(monkeypatch):
    start = list(check_device.new_model(check_device.PARITY_SIZE, torch.device("cpu")).parameters())
    monkeypatch.setattr(check_device, "train", lambda *_: [torch.randn_like(parameter) for parameter in start])
    with pytest.raises(AssertionError, match="another model"):
        check_device.check_parity(torch.device("cpu"))
