"""The transfer to a newcomer: a replica that comes receives the model beside the others' training.

It asks for it in the store of the run. Rank 0 sees that between two steps, and copies the anchors and the optimizers'
state. It trains on while a thread sends the copy (``connection.py``). The means by which the anchors move meanwhile
follow (``mean_record.py``). Once the newcomer has caught up it joins. By then it holds the same anchors as
the others, bit for bit, and an optimizer state that is as old as the copy.

Nothing that arrives is unpickled. It is compared with what the newcomer's own model and optimizers hold, and it must be
finite, before it touches any of them. Whatever goes wrong, the newcomer joins without it, and receives all of it then.
"""

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..optim.curvadion import CurvaDion
from ..optim.optimizer_state import set_step_counts, state_tensors, trainable_parameters
from .connection import AT_A_TIME, Connection, Kind, TransferError
from .mean_record import MeanRecorder, Record, replay
from .parameter_payloads import ParameterPayloads
from .step_hook import StepHook
from .untrained_tensors import UntrainedTensors

log = logging.getLogger(__name__)

# Whose stub names neither.
_dist: Any = dist

# Keys in the store of a run.
_ASKED, _SERVED, _REFUSED, _TRANSFER = "transfers asked", "transfers served", "transfer refused", "transfer"
# How often a newcomer looks in the store, and how often it asks again.
_POLL, _TRIES = 0.2, 3
# The newcomer waits so many times the timeout for rank 0, which may be busy with another one.
_PATIENCE = 4
# Too few replicas have no group, and wait for this one. Others have none for a moment.
_REGROUPING = 5.0


# -- what is sent -----------------------------------------------------------------------------------------------------


class Copied:
    """The tensors of a transfer, on the CPU, in one order on both sides.

    Args:
        optimizers: Their anchors and state.
        parameters: Holds the anchors.
        untrained: Tensors of the module that no step trains.
    """

    def __init__(
        self, optimizers: Sequence[CurvaDion], parameters: ParameterPayloads, untrained: UntrainedTensors
    ) -> None:
        self.anchors: list[Tensor] = []
        self.numbers: dict[Tensor, int] = {}
        self.states: list[dict[str, Tensor]] = []
        self.untrained: dict[str, Tensor] = {}
        kept = parameters.anchors
        for optimizer in optimizers:
            for parameter in trainable_parameters(optimizer).values():
                self.numbers[parameter] = len(self.anchors)
                self.anchors.append(_on_cpu(parameter if kept.missing([parameter]) else kept.of(parameter)).float())
            frozen = {name: p for name, p in optimizer.named_parameters() if not p.requires_grad}
            self.states.append(_all_on_cpu({**state_tensors(optimizer), **frozen}))
        self.untrained = _all_on_cpu({**untrained.parameters_outside(), **untrained.buffers()})

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        states = [tensor for state in self.states for tensor in state.values()]
        return [*self.anchors, *states, *self.untrained.values()]

    @property
    def description(self) -> list[list[Any]]:
        """What each of them is, for JSON."""
        names = [*map(str, range(len(self.anchors))), *(n for s in self.states for n in s), *self.untrained]
        return [[name, str(tensor.dtype), list(tensor.shape)] for name, tensor in zip(names, self.tensors, strict=True)]

    def verify_finite(self) -> None:
        """Check anchors and states.

        Raises:
            TransferError: A number is not finite.
        """
        for tensor in [*self.anchors, *(tensor for state in self.states for tensor in state.values())]:
            if not bool(torch.isfinite(tensor).all()):
                raise TransferError("numbers that are not finite arrived")


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _all_on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: _on_cpu(tensor) for name, tensor in tensors.items()}


# -- the replica that sends -------------------------------------------------------------------------------------------


class Sender:
    """Sends a copy of the model, and the means since then, in a thread.

    Args:
        connect: Opens the connection.
        copied: The copy.
        recorder: Of the means.
    """

    def __init__(self, connect: Callable[[], Connection], copied: Copied, recorder: MeanRecorder) -> None:
        self._connect, self._copied, self.recorder = connect, copied, recorder
        self._thread = threading.Thread(target=self._run, daemon=True, name="transfer to a newcomer")
        self._thread.start()

    @property
    def is_busy(self) -> bool:
        """Whether it sends still."""
        return self._thread.is_alive()

    def close(self, timeout: float) -> None:
        """Record and send no more; wait so many seconds until the thread has ended."""
        self.recorder.close()
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            connection = self._connect()
            connection.send(Kind.COPY, json.dumps(self._copied.description).encode(), self._copied.tensors)
            del self._copied
            self._send_means(connection)
        except (RuntimeError, ValueError) as error:
            log.info(f"A replica that was about to come has gone. {error}")
        finally:
            self.recorder.close()

    def _send_means(self, connection: Connection) -> None:
        while True:
            if self.recorder.is_empty():
                # Sent again and again: so both see that the other one is there.
                connection.send(Kind.CAUGHT_UP)
            try:
                record = self.recorder.take(_POLL)
            except queue.Empty:
                continue
            if record is None:
                connection.send(Kind.END, json.dumps([self.recorder.identity, self.recorder.count]).encode())
                return
            connection.send(Kind.MEAN, record.header, [record.body])


# -- the replica that comes -------------------------------------------------------------------------------------------


class Arrival:
    """What a newcomer receives, in a thread, until it joins.

    Args:
        connect: Opens the connection.
        copied: Tensors like those that are sent; they are overwritten.
    """

    def __init__(self, connect: Callable[[], Connection], copied: Copied) -> None:
        self._connect, self._copied = connect, copied
        self._caught_up, self._ended = threading.Event(), threading.Event()
        # Identity of the recorder, and how many means have arrived.
        self._position: list[int] | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="transfer from rank 0")
        self._thread.start()

    def close(self, timeout: float) -> None:
        """Wait so many seconds until the thread has ended."""
        self._thread.join(timeout)

    def catch_up(self) -> bool:
        """Wait until all that there is has arrived; whether it has."""
        self._caught_up.wait()
        return not self._ended.is_set()

    def is_complete(self, position: Sequence[int], timeout: timedelta) -> bool:
        """Whether all that a recorder has recorded has arrived, or does in time.

        Args:
            position: Its identity, and how many means it has recorded.
            timeout: How long to wait.
        """
        self._ended.wait(timeout.total_seconds())
        return self._position == list(position)

    def _run(self) -> None:
        try:
            self._receive(self._connect())
        except (RuntimeError, ValueError, KeyError, TypeError, IndexError) as error:
            log.info(f"What was received of the run counts for nothing. {error}")
        finally:
            self._ended.set()
            self._caught_up.set()

    def _receive(self, connection: Connection) -> None:
        count, most = 0, 2 * sum(tensor.nbytes for tensor in self._copied.tensors) + AT_A_TIME
        while True:
            kind, header, size = connection.receive()
            if kind == Kind.COPY:
                self._receive_copy(connection, header)
            elif kind == Kind.MEAN and 0 <= size <= most:
                body = torch.empty(size, dtype=torch.uint8)
                connection.fill(body)
                replay(Record(header, body), self._copied.anchors)
                count += 1
            elif kind == Kind.CAUGHT_UP:
                self._caught_up.set()
            else:
                identity, sent = json.loads(header)
                self._copied.verify_finite()
                self._position = [int(identity), int(sent)] if sent == count else None
                return

    def _receive_copy(self, connection: Connection, header: bytes) -> None:
        if json.loads(header) != self._copied.description:
            raise TransferError("the tensors of another model or optimizer arrived")
        for tensor in self._copied.tensors:
            connection.fill(tensor)
        self._copied.verify_finite()

    def install(self, optimizer: CurvaDion, number: int, parameters: ParameterPayloads) -> None:
        """Let an optimizer begin at the anchors that have arrived.

        Args:
            optimizer: Of this replica.
            number: Of the optimizer, among those of the hook.
            parameters: Holds the anchors.
        """
        parameters.anchors.capture(trained := list(trainable_parameters(optimizer).values()))
        for parameter in trained:
            anchor = parameters.anchors.of(parameter)
            anchor.copy_(self._copied.anchors[self._copied.numbers[parameter]])
            parameter.detach().copy_(anchor)
        state = state_tensors(optimizer)
        frozen = {name: p for name, p in optimizer.named_parameters() if not p.requires_grad}
        for name, tensor in {**state, **frozen}.items():
            tensor.detach().copy_(self._copied.states[number][name])
        set_step_counts(optimizer, state)

    def install_untrained(self, untrained: UntrainedTensors) -> None:
        """Let tensors that no optimizer trains be those that have arrived."""
        for name, tensor in {**untrained.parameters_outside(), **untrained.buffers()}.items():
            tensor.detach().copy_(self._copied.untrained[name])


def can_be_followed(sync: StepHook) -> bool:
    """Whether the anchors move by recorded means alone, and are all that replicas must have in common."""
    return (
        sync.settings.sends_parameters_alone
        and not sync.settings.has_outer_step
        and not sync.settings.heterogeneous
        and sync._inner_group is None
        and all(sync._parameters.needs_anchors(one) and sync._parameters.are_quantized(one) for one in sync._optimizers)
    )


# -- both -------------------------------------------------------------------------------------------------------------


class Transfers:
    """The transfers of a run, on one of its replicas.

    Args:
        store: Of the run.
        open_store: Opens another connection to it.
        is_training: Whether the others have a group now.
        timeout: Of a collective.
    """

    def __init__(
        self, store: Any, open_store: Callable[[], Any], is_training: Callable[[], bool], timeout: timedelta
    ) -> None:
        self._store, self._open_store, self._timeout = store, open_store, timeout
        self._is_training = is_training
        self._sender: Sender | None = None
        self._arrival: Arrival | None = None

    def close(self) -> None:
        """Wait for the threads, which no process may end beside: each has a timeout."""
        for part in (self._sender, self._arrival):
            if part is not None:
                part.close(self._timeout.total_seconds())

    def _connection(self, number: int, rank: int) -> Callable[[], Connection]:
        def connect() -> Connection:
            return Connection(_dist.PrefixStore(f"{_TRANSFER} {number}", self._open_store()), rank, self._timeout)

        return connect

    def serve(self, sync: StepHook) -> None:
        """Begin to send to a newcomer, if one has asked and none is served now: on rank 0, between two steps.

        Args:
            sync: Trains on meanwhile.
        """
        if self._sender is not None and self._sender.is_busy:
            return
        if self._store.add(_ASKED, 0) <= self._store.add(_SERVED, 0):
            return
        # A lone replica forms no means that could be followed.
        if sync.world_size == 1 or not can_be_followed(sync):
            self._store.set(f"{_REFUSED} {self._store.add(_SERVED, 0) + 1}", "")
            self._store.add(_SERVED, 1)
            return
        number = self._store.add(_SERVED, 1)
        copied = Copied(sync._optimizers, sync._parameters, sync._untrained)
        recorder = MeanRecorder(copied.numbers, sum(tensor.nbytes for tensor in copied.tensors))
        sync._parameters.anchors.recorder = recorder
        self._sender = Sender(self._connection(number, rank=0), copied, recorder)

    def request(self, sync: StepHook) -> Arrival | None:
        """Receive the model as it is on rank 0; ``None`` where that fails.

        Args:
            sync: Of the newcomer.
        """
        if not can_be_followed(sync):
            return None
        for _ in range(_TRIES):
            number = self._store.add(_ASKED, 1)
            start = trained = time.monotonic()
            while self._store.add(_SERVED, 0) < number:
                now = time.monotonic()
                trained = now if self._is_training() else trained
                if now > start + _PATIENCE * self._timeout.total_seconds() or now > trained + _REGROUPING:
                    return None
                time.sleep(_POLL)
            if self._store.check([f"{_REFUSED} {number}"]):
                return None
            self._arrival = arrival = Arrival(
                self._connection(number, rank=1), Copied(sync._optimizers, sync._parameters, sync._untrained)
            )
            if arrival.catch_up():
                return arrival
        return None
