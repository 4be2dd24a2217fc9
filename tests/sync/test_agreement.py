"""The agreement of a step carries stop requests, and requests to settle."""

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


def settling(rank, world):
    """What is agreed at each step: rank 0 has loaded parameters when rank 1 asks to stop, or asks so itself."""
    model, optimizer = build(hook={}, trigger=EveryNSteps(9))
    agreement = optimizer.sync_hook.agreement
    agreed = []
    for step, asking in enumerate((None, 1, None, None, 0, None)):
        if asking is not None and rank == 0:
            model.load_state_dict(model.state_dict())
        agreement.stop_request = 0.5 if rank == asking else 0.0
        train_step(model, optimizer, step, shard=rank)
        agreed.append((agreement.agreed_request, agreement.agreed_to_settle))
    return agreed


def test_a_request_to_settle_waits_for_a_stop_request_and_is_not_lost(replicas):
    for agreed in replicas.run(2, settling):
        assert agreed == [(0.0, False), (0.5, False), (0.0, True), (0.0, False), (0.5, False), (0.0, True)]
