"""``tests/gpu/check_device.py``, in its short form."""

import re
import sys

import check_device
import pytest
import torch


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_short_form_prints_all_parts(device, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check_device.py", "--smoke", "--device", device])
    check_device.main()
    printed = capsys.readouterr().out
    for update in check_device.LARGEST_DIFFERENCE:
        assert len(re.findall(rf"^  {update} +(local|sync steps in int4) +\d\.\d+ ", printed, re.MULTILINE)) == 2
    for step in check_device.STEPS:
        assert len(re.findall(rf"^  {re.escape(step)} +\d+\.\d+ +\d+\.\d+ +\d+\.\d+$", printed, re.MULTILINE)) == 2
    for layers in (2, 12 if device == "cuda" else 4):
        assert len(re.findall(rf"^  (?:local|sync|sync, factors) +{layers} layers", printed, re.MULTILINE)) == 3
    assert re.search(r"^overlap: \d processes on .*\nphase", printed, re.MULTILINE)
    assert re.search(r"^collectives took \S+% of the time; \S+% beside computation$", printed, re.MULTILINE)


def test_a_device_that_trains_another_model_is_an_error(monkeypatch):
    start = list(check_device.new_model(check_device.PARITY_SIZE, torch.device("cpu")).parameters())
    monkeypatch.setattr(check_device, "train", lambda *_: [torch.randn_like(parameter) for parameter in start])
    with pytest.raises(AssertionError, match="another model"):
        check_device.check_parity(torch.device("cpu"))
