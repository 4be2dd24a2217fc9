"""A collective that fails because of another rank is an error that begins with what to do."""

import breaking
import preloaded
import pytest
import torch
from launching import free_port
from models import build, train_step
from replicas import Failed
from torch.distributed import DistBackendError

from lightning_curvadion import CurvaDion
from lightning_curvadion.sync.agreement import Agreement
from lightning_curvadion.sync.collectives import Collectives
from lightning_curvadion.sync.errors import ReplicaLostError, explain_failure
from lightning_curvadion.sync.failure_reports import report_failure, withdraw_report


def lost_rank(rank, world):
    model, optimizer = build(hook={})
    if rank == 1:
        raise RuntimeError("this rank gives up")
    train_step(model, optimizer, 0, rank)


def test_a_lost_rank_is_an_error_and_not_a_hang(replicas):
    with pytest.raises(Failed) as caught:
        replicas.run(2, lost_rank, timeout=50)
    survivor, lost = str(caught.value).split("rank 1:\n")
    assert "this rank gives up" in lost and "this rank gives up" not in survivor
    assert "ReplicaLostError: Read what rank 1 printed, if it could, and restart" in survivor
    assert (
        "Rank 0 lost the connection to another rank during the RMMC all-reduce. No report came from rank 1" in survivor
    )
    assert "GLHF" not in survivor and "pair.cc" not in survivor


def third_rank_ends(rank, world):
    """One of three ranks ends with an exception, after a report that it has withdrawn."""
    model, optimizer = build(hook={})
    if rank == 2:
        report_failure(ValueError("of a run before"))
        withdraw_report()
        error = ArithmeticError("the batch is broken\nin two lines")
        report_failure(error)
        raise error
    train_step(model, optimizer, 0, rank)


def test_survivors_name_the_rank_that_ended_and_its_exception(replicas):
    with pytest.raises(Failed) as caught:
        replicas.run(3, third_rank_ends, timeout=50)
    errors = [line for line in str(caught.value).splitlines() if "ReplicaLostError: " in line]
    assert len(errors) == 2
    for rank, error in enumerate(errors):
        assert "Mend what ended rank 2: ArithmeticError: the batch is broken. Then restart from the newest" in error
        assert f"Rank {rank} lost the connection to another rank during the RMMC all-reduce. (" in error


# Without Lightning, and nobody catches the exception.
PLAIN_LOOP = """
import sys
import torch.distributed as dist
from models import build, train_step
sys.excepthook = lambda kind, error, _: print(f"a hook of the user's prints {error}")
dist.init_process_group("gloo")
model, optimizer = build(hook={})
for step in range(9):
    if step == 4 and dist.get_rank() == 1:
        raise ArithmeticError("the batch is broken")
    train_step(model, optimizer, step, dist.get_rank())
"""


def test_an_exception_in_a_plain_loop_reaches_the_error_of_the_other_rank(tmp_path):
    (tmp_path / "loop.py").write_text(PLAIN_LOOP)
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [
        preloaded.start(
            tmp_path / "loop.py", folder=tmp_path, output=tmp_path / f"rank{rank}",
            **breaking.environment(**group, RANK=str(rank)),
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        assert [process.wait(60) for process in ranks] == [1, 1]
    finally:
        for process in ranks:
            process.kill()
    survivor, ended = ((tmp_path / f"rank{rank}").read_text() for rank in (0, 1))
    assert "Mend what ended rank 1: ArithmeticError: the batch is broken. Then restart from the newest" in survivor
    assert "a hook of the user's prints the batch is broken" in ended


def test_a_run_that_fails_alone_reports_to_nobody():
    report_failure(ValueError("no process group"))
    withdraw_report()


def test_an_error_that_is_about_no_other_rank_stays_as_it_is():
    with pytest.raises(RuntimeError, match=r"^out of memory$") as caught, explain_failure("an all-reduce"):
        raise RuntimeError("out of memory")
    assert type(caught.value) is RuntimeError


# Texts of ProcessGroupNCCL, NCCLUtils, TCPStore and NCCL.
NCCL_LOST = [
    "NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1275, internal error, NCCL version 2.14.3\n"
    "ncclInternalError: Internal check failed.\nLast error:\nNet : Connection closed by remote peer node1<50260>",
    "NCCL error: remote process exited or there was a network error, NCCL version 2.19.3\nncclRemoteError: A call"
    " failed possibly due to a network error or a remote process exiting prematurely.\nLast error:\nNET/IB : Got"
    " completion from peer 10.42.0.2<47534> with error 5, opcode 48, len 32764, vendor err 244",
    "NCCL communicator was aborted on rank 1. ",
    "[1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value store by"
    " store->get('0'), but store->get('0') got error: Failed to recv, got 0 bytes. Connection was likely closed. Did"
    " the remote server shutdown or crash?",
]
NCCL_LATE = [
    "NCCL communicator was aborted on rank 3.  Original reason for failure was: [Rank 3] Watchdog caught collective"
    " operation timeout: WorkNCCL(SeqNum=56693, OpType=ALLREDUCE, Timeout(ms)=1800000) ran for 1804371 milliseconds"
    " before timing out.",
    "NCCL timeout in communicator initialization.",
]


@pytest.mark.parametrize(
    ("text", "words"),
    [(text, "Rank 0 lost the connection to another rank during") for text in NCCL_LOST]
    + [(text, "On rank 0 an all-reduce timed out") for text in NCCL_LATE],
)
def test_what_nccl_says_of_another_rank_is_explained(text, words):
    with pytest.raises(ReplicaLostError, match=words) as caught, explain_failure("an all-reduce"):
        raise DistBackendError(text)
    assert " ".join(text.split()) in " ".join(str(caught.value).split())


@pytest.mark.parametrize(
    "error",
    [
        DistBackendError(
            "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:317, unhandled system error (run with"
            " NCCL_DEBUG=INFO for details), NCCL version 2.21.5\nncclSystemError: System call (e.g. socket, malloc) or"
            " external library call failed or device error.\nLast error:\nError while creating shared memory segment"
            " /dev/shm/nccl-EoOvZr (size 7340384)"
        ),
        torch.AcceleratorError("CUDA error: the launch timed out and was terminated"),
    ],
)
def test_an_error_of_this_machine_stays_as_it_is(error):
    with pytest.raises(RuntimeError) as caught, explain_failure("an all-reduce"):
        raise error
    assert caught.value is error


class LateError(torch.Tensor):
    """Fails where the host reads it, as a tensor does whose collective has only been enqueued."""

    def tolist(self):
        raise DistBackendError(NCCL_LATE[0])


def read_late(rank, world):
    collectives = Collectives()
    collectives.join()
    signal = torch.zeros(2, dtype=torch.float64).as_subclass(LateError)
    agreement, optimizer = Agreement(collectives), CurvaDion([torch.nn.Parameter(torch.zeros(2, 2))])
    agreement.start(optimizer, signal)
    with pytest.raises(ReplicaLostError, match=f"On rank {rank} the RMMC all-reduce timed out"):
        agreement.take(optimizer)


def test_an_error_that_comes_up_where_the_agreement_is_read_is_explained_too(replicas):
    replicas.run(2, read_late)
