"""A learning rate tuned for AdamW carries over with ``lr_scale="match_rms_adamw"``: models trained, and swept."""

from functools import partial
from itertools import product

import pytest
from classifiers import CLASSIFIERS, adamw, curvadion, load_digits, trained
from torch import Tensor, nn

from lightning_curvadion import CurvaDion, split_parameters

OF_ADAMW = (0.004, 0.008, 0.016)
OF_MATRICES, OF_THE_REST = (0.01, 0.02, 0.04), (0.5, 1.0, 2.0)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    return load_digits()


def with_own_rates(module: nn.Module, lr: float, of_the_rest: float) -> CurvaDion:
    return CurvaDion(split_parameters(module, options={"adamw": {"lr": of_the_rest}}), lr=lr)


@pytest.mark.parametrize("model", CLASSIFIERS.values(), ids=CLASSIFIERS)
def test_adamws_best_rate_ends_within_five_percent_of_a_sweep_of_ours(model, digits, replicas):
    of_adamw = trained(model, [partial(adamw, lr=lr) for lr in OF_ADAMW], digits, replicas)
    loss, lr = min(zip(of_adamw, OF_ADAMW, strict=True))
    sweep = [
        partial(with_own_rates, lr=own, of_the_rest=share * lr) for own, share in product(OF_MATRICES, OF_THE_REST)
    ]
    carried, *swept = trained(model, [partial(curvadion, lr=lr), *sweep], digits, replicas)
    print(f"\n{carried:.3f} at AdamW's rate of {lr}; {min(swept):.3f} swept; AdamW {loss:.3f}")
    assert carried < 1.05 * min(swept)
