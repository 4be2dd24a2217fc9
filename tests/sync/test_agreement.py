"""The agreement of a step carries stop requests."""

import pytest
from models import build, train_step

from lightning_curvadion import EveryNSteps


def requesting(rank, world):
    model, optimizer = build(hook={}, trigger=EveryNSteps(3))
    agreed = []
    for step, request in enumerate((0.0, 0.5 if rank == 1 else 0.0, 0.0, 0.75 if rank == 0 else 0.5)):
        optimizer.sync_hook.agreement.stop_request = request
        train_step(model, optimizer, step, shard=rank)
        agreed.append(optimizer.sync_hook.agreement.agreed_request)
    model.head.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        train_step(model, optimizer, 4, shard=rank)
    return agreed


def test_all_ranks_agree_on_a_stop_request_of_one_in_the_next_step_and_a_bad_gradient_outranks_it(replicas):
    for agreed in replicas.run(2, requesting):
        assert agreed == [0.0, 0.5, 0.0, 0.75]
