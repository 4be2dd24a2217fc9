"""A configuration that cannot train is an error before training, which says what to write instead."""

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from training import Module, trainer_for

from lightning_curvadion import CurvaDionStrategy, DriftThreshold


def fit_with_optimizer(rank, world, optimizer):
    with pytest.raises(MisconfigurationException, match="needs CurvaDion optimizers") as caught:
        trainer_for(rank, world).fit(Module(optimizer=optimizer))
    return str(caught.value)


def no_optimizer(parameters):
    return None


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.LBFGS, no_optimizer])
def test_an_optimizer_other_than_curvadion(replicas, optimizer):
    for message in replicas.run(2, fit_with_optimizer, optimizer):
        assert "return CurvaDion(split_parameters(self), lr=0.01)" in message


def fit_with_sparse_embedding(rank, world):
    module = Module()
    module.table = nn.Embedding(4, 4, sparse=True)
    with pytest.raises(MisconfigurationException, match=r"table is a Embedding with sparse=True.*sparse=False"):
        trainer_for(rank, world).fit(module)


def test_a_sparse_embedding(replicas):
    replicas.run(2, fit_with_sparse_embedding)


def fit_different_models(rank, world):
    module = Module()
    if rank == 1:
        module.extra = nn.Linear(3, 3)
    with pytest.raises(MisconfigurationException, match="replicas differ"):
        trainer_for(rank, world).fit(module)


def test_different_models_on_the_ranks(replicas):
    replicas.run(2, fit_different_models)


def fit_without_consensus(rank, world):
    trainer = trainer_for(rank, world, CurvaDionStrategy(consensus="none"))
    with pytest.raises(MisconfigurationException, match=r'^use consensus="average", or a trigger.*DriftThreshold'):
        trainer.fit(Module(DriftThreshold(0.02)))


def test_a_drift_that_no_consensus_ends(replicas):
    replicas.run(2, fit_without_consensus)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"consensus": "mean"}, "consensus must be one of"),
        ({"momentum": "mean"}, "momentum must be one of"),
        ({"wire_format": "int3"}, "wire_format must be one of"),
        ({"ddp_comm_hook": print}, "ddp_comm_hook: CurvaDionStrategy does not wrap"),
        ({"find_unused_parameters": True}, "find_unused_parameters: CurvaDionStrategy does not wrap"),
        ({"wire_fmt": "int2"}, r"^wire_fmt: CurvaDionStrategy has no such argument; did you mean wire_format\?$"),
        ({"colour": "red"}, r"^colour: CurvaDionStrategy has no such argument$"),
        ({"state_dict_type": "sharded"}, "every replica holds the whole model"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_argument_of_the_strategy(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        CurvaDionStrategy(**options)
