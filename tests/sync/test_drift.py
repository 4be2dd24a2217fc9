"""The drift that a hook measures is the distance of a replica to the consensus."""

import pytest
import torch
from models import build, train_step

from lightning_curvadion import EveryNSteps, ProcessGroupSync


class TrueDrift(ProcessGroupSync):
    """Measures the drift from copies of the parameters before and after the consensus."""

    def _mean_right(self, optimizer, factors, whole):
        before = [parameter.detach().clone() for _, parameter in optimizer.named_parameters()]
        means = super()._mean_right(optimizer, factors, whole)
        consensus = [parameter.detach() for _, parameter in optimizer.named_parameters()]
        distance = sum((a - b).double().square().sum() for a, b in zip(before, consensus, strict=True))
        self.true_drift = (distance / sum(b.double().square().sum() for b in consensus)).sqrt().item()
        return means


def drifts(rank, world, settings):
    """Of each step what the hook measures, and of each sync step the true drift."""
    torch.manual_seed(0)
    model, optimizer = build(trigger=EveryNSteps(2))
    sync = TrueDrift(**settings)
    optimizer.register_sync_hook(sync)
    sync.measure_drift()
    measured, true = [], []
    for step in range(4):
        train_step(model, optimizer, step, rank)
        measured.append(sync.drift)
        if optimizer.last_step.synced:
            true.append(sync.true_drift)
    return measured, true


@pytest.mark.parametrize("settings", [{}, {"momentum": "local", "wire_format": "int2", "chunk": 1000}])
def test_drift_is_the_distance_to_the_consensus(replicas, settings):
    for measured, true in replicas.run(2, drifts, settings):
        assert measured[0] is None and measured[2] is None
        assert [measured[1], measured[3]] == pytest.approx(true, rel=1e-4) and min(true) > 0
