"""Membership: replicas of a run that may be lost, and may come, while it trains.

Who takes part is decided by torch's own rendezvous (``torch.distributed.elastic``): it keeps the members of a round in
a store at one address, notices by missing heartbeats who is gone, and forms the next round. Here is only what follows
from a round: a process group of its members, and a common model.

The store must outlive every replica. Whoever reaches it may join, and the rendezvous unpickles what lies there: keep it
in a private network.
"""

import atexit
import hashlib
import json
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousInfo, dynamic_rendezvous
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

from .collectives import meet
from .errors import LeftBehindError, ReplicaLostError, explain_failure
from .plain_state import load_plain_state, plain_state, structure_of
from .process_group_sync import ProcessGroupSync
from .replica_checks import first_difference
from .replica_groups import Group, Replica, arrange
from .transfer_to_newcomers import Transfers

log = logging.getLogger(__name__)

T = TypeVar("T")

# Whose stub names no stores.
_stores: Any = dist

# A member that has missed so many heartbeats is gone.
_MISSED = 3
# How often the members of a round look what has become of it.
_POLL = 0.1
# How long a round waits for more members once it has enough: those of the last one come at their next look.
_LAST_CALL = timedelta(seconds=0.5)
# Where C10dRendezvousBackend keeps its state.
_RENDEZVOUS = "torch.rendezvous."
# Replicas that form a new group are none of the old one for a moment.
_REGROUPING = timedelta(seconds=3)
# Of the newest group, in the store of a run.
_GENERATION = "generation"
# In the range of stop requests, see ``Agreement``; below those of a strategy.
REGROUP = 0.3


class Membership:
    """The replicas of a run, of which some may be lost and others come, in a loop of your own.

    A process that makes one is a replica of its own at first: make the model, the optimizer and its hook then, and
    :meth:`join`. Gloo only.

    Args:
        endpoint: ``"host:port"`` of the store that every replica reaches, see :func:`host_store`.
        min_replicas: Fewer wait for others.
        max_replicas: So many are the most.
        run_id: Of the run; replicas of other runs may use the store too.
        timeout: How long a collective waits for a replica that does not arrive, which then counts as lost.
        join_timeout: How long a replica waits for ``min_replicas``.
        heartbeat: How often a replica tells the store that it is there. One that has missed three is gone. The clocks
            of all machines must agree to that, since the rendezvous compares them.

    Raises:
        ValueError: On a bad argument.

    Example::

        members = Membership("10.0.0.1:29400", min_replicas=2)
        optimizer.register_sync_hook(sync := ProcessGroupSync())
        step = members.join(sync, {"step": 0})["step"]
        while step < 1000:
            try:
                loss = train_on_a_batch()  # ends with optimizer.step()
                step += 1
                if not members.should_regroup(sync):
                    continue
            except ReplicaLostError:
                pass
            step = members.join(sync, {"step": step})["step"]
    """

    def __init__(
        self,
        endpoint: str,
        min_replicas: int = 1,
        max_replicas: int = 1024,
        run_id: str = "curvadion",
        timeout: timedelta = timedelta(seconds=30),
        join_timeout: timedelta = timedelta(minutes=10),
        heartbeat: timedelta = timedelta(seconds=0.7),
    ) -> None:
        host, _, port = endpoint.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f'endpoint must be "host:port" of a store that every replica reaches, not {endpoint!r}')
        if not 1 <= min_replicas <= max_replicas:
            raise ValueError(f"min_replicas must be from 1 to max_replicas={max_replicas}, not {min_replicas}")
        if dist.is_initialized():
            raise ValueError("make the Membership instead of calling torch.distributed.init_process_group")
        # Or the rendezvous tells of a store of its first member at the first round alone, and a new one waits in vain.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        self._timeout = timeout
        self._open_store = partial(_stores.TCPStore, host, int(port), is_master=False, timeout=timeout)
        self._store = self._open_store()
        self._rendezvous = DynamicRendezvousHandler.from_backend(
            run_id,
            self._store,
            C10dRendezvousBackend(self._store, run_id),
            min_replicas,
            max_replicas,
            timeout=RendezvousTimeout(join=join_timeout, last_call=_LAST_CALL),
            # It takes whole seconds for granted, and any number for a timedelta's.
            keep_alive_interval=cast(int, heartbeat.total_seconds()),
            keep_alive_max_attempt=_MISSED,
        )
        self._rendezvous._state_holder._cache_duration = _POLL  # type: ignore[attr-defined]
        self._run_id = run_id
        self._transfers = Transfers(
            self.store,
            lambda: _stores.PrefixStore(self._run_id, self._open_store()),
            self._is_training,
            timeout,
        )
        # A thread of Python that is in C++ when its process ends aborts it.
        atexit.register(self._end_threads)
        # Of the last group in which this replica has trained: its number, this rank, its size.
        self._generation = self._rank = self._members = 0
        self._prepared = 0
        self._asked, self._others_wait = 0.0, False
        dist.init_process_group("gloo", store=_stores.HashStore(), rank=0, world_size=1)

    @property
    def size(self) -> int:
        """Number of replicas now."""
        return dist.get_world_size()

    @property
    def store(self) -> Any:
        """The store of the run."""
        return _stores.PrefixStore(self._run_id, self._store)

    def join(self, sync: ProcessGroupSync, progress: Mapping[str, float]) -> dict[str, float]:
        """Form a group of all that are there, and make them one model.

        The replicas of the last group go on from the last consensus, and others begin there, with the state of the
        first one's optimizers and their hyperparameters (:meth:`ProcessGroupSync.regroup`). A new one receives both
        before, while the others train (:meth:`catch_up`). Where all are new, the first one's values count.

        Args:
            sync: Attached to this replica's optimizers.
            progress: Numbers that say how far the run is, such as the step.

        Returns:
            The same of a replica that has trained.

        Raises:
            ValueError: Another replica has another model or other settings.
            RendezvousTimeoutError: ``min_replicas`` have not come in time.
        """

        if not self._generation:
            self.catch_up(sync)

        def make_one_model(group: Group) -> dict[str, float]:
            own = json.dumps([dict(progress), plain_state(sync.optimizers)])
            common, states = json.loads(group.exchange("common", own.encode()))
            load_plain_state(sync.optimizers, states)
            sync.regroup(group.trained)
            if sync.agreement.stop_request == REGROUP:
                # It is done.
                sync.agreement.stop_request = 0.0
            return dict(common)

        return cast(dict[str, float], self.form_group(structure_of(sync), {}, make_one_model))

    def catch_up(self, sync: ProcessGroupSync) -> bool:
        """Receive the model and the optimizers' state of a run that goes on, beside the others' training.

        It waits until all has arrived but what the next steps add. A replica that has not caught up, as where the
        settings do not allow it (``transfer_to_newcomers.py``), receives all of it when it joins.

        Args:
            sync: Attached to this replica's optimizers, in its group of its own.

        Returns:
            Whether it has caught up.
        """
        if self.store.check([_GENERATION]):
            sync._arrival = self._transfers.request(sync)
        return sync._arrival is not None

    def form_group(
        self,
        structure: list[str],
        standing: Mapping[str, Any],
        make_one_model: Callable[[Group], T],
        waits: bool = True,
        takes_over: bool = True,
    ) -> T | None:
        """Form a group of all that are there, and another one where a replica is lost on the way.

        Args:
            structure: What the replicas must have in common, in lines.
            standing: Where this one stands, for JSON. Replicas that have not trained with the others take part where
                their ``standing["place"]`` is that of the others, and wait for the next group elsewhere.
            make_one_model: Called in the new group.
            waits: Whether to wait for the next group where one formed without this replica.
            takes_over: Whether this replica takes over the run of the others where they went on without it.

        Returns:
            What it returned; ``None`` where the group formed without this replica.

        Raises:
            LeftBehindError: The others went on without this replica.
            ValueError: Another replica has another structure.
            RendezvousTimeoutError: ``min_replicas`` have not come in time.
        """
        while True:
            if not takes_over:
                self._verify_not_behind()
            try:
                group = self._form_group(structure, standing)
                if group is None and waits:
                    continue
                if group is None:
                    return None
                result = make_one_model(group)
                self._prepared = group.generation
                meet("the barrier of a new group")
            except ReplicaLostError as error:
                log.warning(f"A replica was lost while the replicas formed a group, and they form another one. {error}")
                continue
            self._generation, self._rank, self._members = group.generation, group.rank, group.size
            if group.rank == 0:
                self.store.set(_GENERATION, str(group.generation))
            log.info(f"Rank {group.rank} of {group.size} replicas, of which {group.trained} have trained before.")
            return result

    def _verify_not_behind(self) -> None:
        newest = int(self.store.get(_GENERATION)) if self.store.check([_GENERATION]) else 0
        if newest > max(self._generation, self._prepared):
            raise LeftBehindError(
                "Start this replica again, and it joins the others: it did not answer them for a while, as where a"
                " machine stands still or is cut off, and they went on without it"
            )

    def fall_silent(self) -> None:
        """Let the others take this replica for lost."""
        self._rendezvous._stop_heartbeats()

    def _is_training(self) -> bool:
        """Whether the members of the run have a group."""
        self._rendezvous._state_holder.sync()
        return self._rendezvous._state_holder.state.complete

    def waiting(self, sync: ProcessGroupSync) -> bool:
        """Whether others wait to take part, as the store knew a second ago. Call it on rank 0 between two steps.

        Here it also begins to send to those that ask to :meth:`catch_up`.

        Args:
            sync: Attached to this replica's optimizers.
        """
        if time.monotonic() > self._asked + 1:
            self._asked = time.monotonic()
            self._others_wait = self._rendezvous.num_nodes_waiting() > 0
            self._transfers.serve(sync)
        return self._others_wait

    def should_regroup(self, sync: ProcessGroupSync) -> bool:
        """Whether all replicas are to :meth:`join` again now, since others wait to take part.

        Call it after every step; the answer is the same on all replicas. It asks the store once a second.
        """
        if dist.get_rank() == 0 and self.waiting(sync):
            sync.agreement.stop_request = REGROUP
        return sync.agreement.agreed_request == REGROUP

    def is_over(self) -> bool:
        """Whether the run has ended, or has lost all its replicas: asked of a run that had begun."""
        deadline = time.monotonic() + _REGROUPING.total_seconds()
        while time.monotonic() < deadline and not self._rendezvous.is_closed():
            if self._rendezvous._state_holder.state.participants:
                return False
            time.sleep(_POLL)
        return True

    def _end_threads(self) -> None:
        self.fall_silent()
        self._transfers.close()

    def end(self) -> None:
        """Let nobody join any more."""
        self._rendezvous.shutdown()

    def close(self) -> None:
        """End the run for all: nobody joins any more."""
        self.leave()
        self.end()

    def leave(self) -> None:
        """Take no part any more; the others go on."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _form_group(self, structure: list[str], standing: Mapping[str, Any]) -> Group | None:
        """The group of the next round, and the default process group; ``None`` where it formed without this replica."""
        self.leave()
        with _frequent_looks():
            members = self._rendezvous.next_rendezvous()
        self._others_wait = False
        with explain_failure("the forming of a group"):
            replicas = self._compare(members, structure, standing)
            group = arrange(replicas, members.rank, self._members, _stores.PrefixStore("group", members.store))
            if group is None:
                return None
            dist.init_process_group(
                "gloo", store=group.store, rank=group.rank, world_size=group.size, timeout=self._timeout
            )
        return group

    def _compare(
        self, members: RendezvousInfo, structure: list[str], standing: Mapping[str, Any]
    ) -> dict[int, Replica]:
        """The members of a round that train what the others train, by their number in the round.

        Raises:
            ValueError: This one trains something else. The others go on without it.
            ReplicaLostError: The round has changed meanwhile.
        """
        store, numbers = members.store, range(members.world_size)
        if members.rank not in numbers:
            raise ReplicaLostError("a member of the round was taken for gone while it formed")
        digest = hashlib.sha256("\n".join(structure).encode()).hexdigest()
        own = Replica(self._generation, self._prepared, self._rank, digest, dict(standing))
        store.set(f"structure {members.rank}", json.dumps(structure))
        store.set(f"member {members.rank}", json.dumps(own))
        published = [Replica(*json.loads(store.get(f"member {number}"))) for number in numbers]
        # The first of those that have trained counts.
        reference = max(numbers, key=lambda number: (published[number].generation, -number))
        at_one_place = own.standing.get("place") == published[reference].standing.get("place")
        if at_one_place and digest != published[reference].digest:
            theirs = json.loads(store.get(f"structure {reference}"))
            raise ValueError(first_difference([theirs, structure], ["the run", "this replica"]))
        return {number: published[number] for number in numbers if published[number].digest == digest}


@contextmanager
def _frequent_looks() -> Iterator[None]:
    """Let the rendezvous look for what others have done more often than once a second."""

    def wait(seconds: float | tuple[float, float]) -> None:
        time.sleep(min(_POLL, random.uniform(*seconds) if isinstance(seconds, tuple) else seconds))

    module: Any = dynamic_rendezvous
    slow, module._delay = module._delay, wait
    try:
        yield
    finally:
        module._delay = slow


def host_store(port: int, host: str = "0.0.0.0") -> Any:
    """The store of runs, at a port of this machine, for as long as the result lives.

    Args:
        port: 0 for any; the result's ``port`` tells which.
        host: Address of the network interface that it listens to.
    """
    return _stores.TCPStore(host, port, is_master=True, wait_for_workers=False)


def run_name(number: int) -> str:
    """The ``run_id`` of one of the runs that a store has seen one after the other."""
    return f"curvadion/{number}"


def pulse(store: Any) -> tuple[int, bytes]:
    """What changes as long as replicas of the newest run are there: its number, and what its rendezvous holds.

    Args:
        store: Of :func:`host_store`.
    """
    number = 0
    while store.check([_RENDEZVOUS + run_name(number + 1)]):
        number += 1
    key = _RENDEZVOUS + run_name(number)
    return number, store.get(key) if store.check([key]) else b""
