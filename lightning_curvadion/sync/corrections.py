"""The correction of all momenta by a mean of displacements that has arrived."""

from torch import Tensor

from ..optim.curvadion import CurvaDion
from ..optim.momentum_correction import Correction, correct_momenta_
from ..optim.sharded_corrections import correct_sharded_momenta_


def correct_all(optimizer: CurvaDion, corrections: dict[Tensor, Correction]) -> None:
    """Correct the momenta of an optimizer's parameters, once: no correction is left."""
    if not corrections:
        return
    roots = optimizer.take_roots()
    for group in optimizer.param_groups:
        own = {parameter: corrections.pop(parameter) for parameter in group["params"] if parameter in corrections}
        if optimizer.shards is not None and group["algorithm"] == "dion":
            correct_sharded_momenta_(group, optimizer.state, own, roots, optimizer.shards)
        else:
            correct_momenta_(group, optimizer.state, own, roots)
