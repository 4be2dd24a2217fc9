"""Four rooms, one direction: what may import what, and where collectives may be called.

The imports are read from the source, so that those inside of functions count too.
"""

import ast
from pathlib import Path

import pytest
from training import ROOT

PACKAGE = ROOT / "lightning_curvadion"
ROOMS = ("optim", "sync", "trainer", "cli")
COLLECTIVES = {
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "batch_isend_irecv",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "irecv",
    "isend",
    "monitored_barrier",
    "recv",
    "recv_object_list",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
    "send",
    "send_object_list",
}
# Private names of a Trainer, its loops, connectors, callbacks and modules.
TRAINER_INTERNALS = {
    "_average_model",
    "_batches_that_stepped",
    "_broadcast_sigterm_tensor",
    "_device_mesh",
    "_init_optimizers_and_lr_schedulers",
    "_logger_connector",
    "_materialize_distributed_module",
    "_signal_connector",
    "_sigterm_notifier_fn",
    "_slurm_sigusr_handler_fn",
    "_trainer",
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    """The folder of the package that a file lies in; the files beside the rooms are above all of them."""
    return path.relative_to(PACKAGE).parts[0] if path.parent != PACKAGE else "top"


def imports_of(source: str, package: str) -> set[str]:
    """Absolute names of all that a source imports, given the package it lies in."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def imports(path: Path) -> set[str]:
    return imports_of(path.read_text(), ".".join(path.parent.relative_to(ROOT).parts))


def distributed_collectives(source: str) -> set[str]:
    """Collectives of ``torch.distributed`` that a source calls, under whatever name it imported the module."""
    tree = ast.parse(source)
    modules, functions = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name for alias in node.names if alias.name.startswith("torch")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            modules |= {alias.asname or alias.name for alias in node.names if alias.name == "distributed"}
            if "distributed" in (node.module or ""):
                functions |= {alias.asname or alias.name for alias in node.names if alias.name in COLLECTIVES}
    called = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in COLLECTIVES:
            owner = ast.unparse(node.value)
            if owner in modules - {"torch"} or owner.startswith("torch.distributed"):
                called.add(node.attr)
        elif isinstance(node, ast.Name) and node.id in functions:
            called.add(node.id)
    return called


def private_names(source: str) -> set[str]:
    """Names that a source reads, writes, imports or looks up by their text."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            # What an object of ours calls its own attribute is its own affair.
            if ast.unparse(node.value) != "self":
                names.add(node.attr)
        elif isinstance(node, ast.alias):
            names.add(node.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
    return names & TRAINER_INTERNALS


def test_every_file_lies_in_a_room():
    assert {room_of(path) for path in FILES} == {*ROOMS, "top"}
    assert sorted(path.name for path in FILES if room_of(path) == "top") == ["__init__.py", "__main__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    rooms = {name.split(".")[1] for name in imports(path) if name.startswith("lightning_curvadion.")} & set(ROOMS)
    room = room_of(path)
    below = ROOMS if room == "top" else ROOMS[: ROOMS.index(room) + 1]
    assert rooms <= set(below), f"{room} imports {rooms - set(below)}; the direction is cli -> trainer -> sync -> optim"


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) in ("optim", "sync")], ids=lambda path: path.stem)
def test_optim_and_sync_do_not_know_lightning_and_optim_no_process_group(path):
    forbidden = ("lightning", "pytorch_lightning")
    if room_of(path) == "optim":
        forbidden += ("torch.distributed", "torch.nn.parallel")
    found = {name for name in imports(path) for module in forbidden if f"{name}.".startswith(f"{module}.")}
    assert not found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_collectives_are_called_in_one_file(path):
    called = distributed_collectives(path.read_text())
    if path == PACKAGE / "sync/collectives.py":
        assert {"all_reduce", "all_gather", "all_to_all_single", "broadcast"} <= called
    else:
        assert not called


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_names_of_lightning_are_touched_in_one_file(path):
    touched = private_names(path.read_text())
    if path == PACKAGE / "trainer/lightning_internals.py":
        assert touched == TRAINER_INTERNALS
    else:
        assert not touched


# -- the readers themselves -------------------------------------------------------------------------------------------


def test_an_arrow_that_turns_round_is_seen_in_every_spelling():
    package = "lightning_curvadion.optim"
    for line in (
        "from ..sync.collectives import Collectives",
        "from ..sync import collectives",
        "from .. import sync",
        "import lightning_curvadion.sync.collectives",
        "def f():\n    from lightning_curvadion.sync import collectives",
    ):
        assert any(name.startswith("lightning_curvadion.sync") for name in imports_of(line, package)), line


def test_a_collective_is_seen_in_every_spelling():
    for source in (
        "import torch.distributed as dist\ndist.all_reduce(x)",
        "import torch\ntorch.distributed.all_reduce(x)",
        "from torch import distributed\ndistributed.all_reduce(x)",
        "from torch.distributed import all_reduce as reduce_all\nreduce_all(x)",
        "import torch.distributed as dist\nf = dist.all_reduce",
    ):
        assert distributed_collectives(source), source
    assert not distributed_collectives("super().broadcast(x)\nself._collectives.all_gather(x)")
