"""What version 0.1.0 saved, before the package was cut into rooms, loads and continues as that version continued."""

import pytest
import torch
from earlier_version import CUT, END, fit, loop
from training import ROOT, same

SAVED = ROOT / "tests/data/version_0_1_0"


@pytest.fixture(scope="module")
def ends():
    return torch.load(SAVED / "ends.pt", weights_only=True)


def test_a_checkpoint_of_the_trainer_continues(replicas, ends):
    first, second = replicas.run(2, fit, END, None, str(SAVED / "trainer.pt"), timeout=120)
    assert same(first, second)
    torch.testing.assert_close(first, ends["trainer"], rtol=1e-5, atol=1e-5)
    start = list(torch.load(SAVED / "trainer.pt", weights_only=True)["state_dict"].values())
    assert max((a - b).abs().max() for a, b in zip(start, first, strict=False) if a.shape == b.shape) > 1e-3


def test_a_state_of_a_plain_loop_with_residuals_continues(replicas, ends):
    saved = torch.load(SAVED / "loop_rank1.pt", weights_only=True)["optimizer"]
    kept = {name for state in saved["state"].values() for name in state}
    assert {"momentum", "Q", "norm", "residual", "outer_momentum", "exp_avg", "step"} <= kept
    for own, expected in zip(replicas.run(2, loop, CUT, END, None, str(SAVED)), ends["loop"], strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)
