"""A learning rate tuned for AdamW carries over with ``lr_scale="match_rms_adamw"``: models trained, and swept."""

from collections.abc import Iterable

import pytest
import torch
from classifiers import CLASSIFIERS, load_digits, trained
from torch import Tensor

from lightning_curvadion import CurvaDion, split_parameters

OF_ADAMW = (0.004, 0.008, 0.016)
OF_MATRICES, OF_THE_REST = (0.01, 0.02, 0.04), (0.5, 1.0, 2.0)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    return load_digits()


def best(losses: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """The lowest loss, and the learning rate it was found at."""
    return min(losses)


@pytest.mark.parametrize("model", CLASSIFIERS.values(), ids=CLASSIFIERS)
def test_adamws_best_rate_ends_within_five_percent_of_a_sweep_of_ours(model, digits):
    of_adamw, lr = best(
        (trained(model, lambda net, lr=lr: torch.optim.AdamW(net.parameters(), lr=lr), digits), lr) for lr in OF_ADAMW
    )
    carried = trained(model, lambda net: CurvaDion(split_parameters(net), lr=lr, lr_scale="match_rms_adamw"), digits)
    swept = min(
        trained(
            model,
            lambda net, own=own, share=share: CurvaDion(
                split_parameters(net, options={"adamw": {"lr": share * lr}}), lr=own
            ),
            digits,
        )
        for own in OF_MATRICES
        for share in OF_THE_REST
    )
    print(f"\n{carried:.3f} at AdamW's rate of {lr}; {swept:.3f} swept; AdamW {of_adamw:.3f}")
    assert carried < 1.05 * swept
