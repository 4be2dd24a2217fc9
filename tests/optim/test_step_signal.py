"""The signal of a step: measured before anything is written, and read by the host once."""

import pytest
import torch
from models import build, equal, matrix, state_of, with_gradients
from torch import nn

from lightning_curvadion import CurvaDion
from lightning_curvadion.optim.local_step import local_step
from lightning_curvadion.optim.step_signal import SignalMeter


def test_measuring_writes_nothing():
    model, optimizer = build()
    with_gradients(*model.parameters())
    optimizer.step()
    before = state_of(optimizer)
    with_gradients(*model.parameters(), seed=1)
    signal = SignalMeter().measure(optimizer, optimizer.matrix_stacks(), rank=0)
    assert signal.numbers[0] > 0 and signal.numbers[1] == 0
    assert equal(before, state_of(optimizer))


def test_the_code_of_a_bad_gradient_depends_on_the_rank():
    parameter = matrix()
    optimizer = CurvaDion([parameter])
    parameter.grad = torch.full_like(parameter, torch.nan)
    codes = [SignalMeter().measure(optimizer, optimizer.matrix_stacks(), rank).numbers[1].item() for rank in (0, 3)]
    assert 1 <= codes[0] < codes[1]


@pytest.mark.gpu
def test_one_host_synchronisation_a_step_on_a_gpu():
    parameters = [nn.Parameter(torch.randn(64, 32, device="cuda")) for _ in range(4)]
    optimizer, meter = CurvaDion(parameters), SignalMeter()
    for step in range(3):
        for p in parameters:
            p.grad = torch.randn_like(p)
        stacks = optimizer.matrix_stacks()
        if step == 2:
            torch.cuda.set_sync_debug_mode("error")
        try:
            signal = meter.measure(optimizer, stacks, rank=0)
            torch.cuda.set_sync_debug_mode("default")
            signal.numbers.tolist()
            if step == 2:
                torch.cuda.set_sync_debug_mode("error")
            local_step(optimizer, stacks)
        finally:
            torch.cuda.set_sync_debug_mode("default")
