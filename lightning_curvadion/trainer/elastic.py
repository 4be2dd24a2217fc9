"""ElasticRun: replicas of a Trainer's run that are lost and that come while it trains.

Who takes part is decided in ``sync/membership.py``, and what becomes of an operation that a loss cuts in half in
``sync/recovery.py``. Here is what follows for a Trainer: its ranks, its samplers, and where its loop is.
"""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sized
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, cast

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.utilities import rank_zero
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousTimeoutError
from torch.utils.data import DataLoader, DistributedSampler

from ..sync.errors import ReplicaLostError
from ..sync.membership import REGROUP, Membership, run_name
from ..sync.membership_changes import MembershipChange
from ..sync.plain_state import load_plain_state, plain_state, structure_of
from ..sync.process_group_sync import ProcessGroupSync
from ..sync.recovery import Recovery
from ..sync.replica_groups import Group
from . import hand_over
from .consensus_callback import moving_averages
from .lightning_internals import (
    batches_begun,
    log_beside,
    restart_data,
    train_dataloaders,
    update_epoch_length,
    with_sampler,
)
from .member_samplers import Drawn, MemberEvaluationSampler, MemberSampler
from .watchdog import Watchdog

log = logging.getLogger(__name__)

T = TypeVar("T")
# How long the replicas that start a run wait for as many as were asked for.
_START = timedelta(seconds=30)
# A replica that makes no progress for so many times the timeout counts as lost.
_STILL = 2
# How long a store that this process has started stays without replicas.
_IDLE = 60


class _Formed(NamedTuple):
    group: Group
    handed_over: bytes


class ElasticRun:
    """This replica's part in a run whose replicas are lost and come.

    Args:
        min_replicas: Fewer wait for others.
        timeout: How long a collective waits for a replica, which then counts as lost.

    Attributes:
        rank: Of this replica.
        size: Number of replicas.
        changes: What happened to them, as this one saw it.
        has_begun: Whether it takes part in a run that has not ended.
        is_newcomer: Whether the others train already, and this one is to take over their run.
        recovery: Counts the joint operations.
    """

    def __init__(self, min_replicas: int, timeout: timedelta | None) -> None:
        self._min_replicas, self._timeout = min_replicas, timeout or timedelta(seconds=30)
        # How long too few replicas wait for others.
        self._join_timeout = 20 * self._timeout
        self.rank, self.size = 0, 1
        self.has_begun = self.is_newcomer = self.forming = self.has_left = False
        self.changes: list[MembershipChange] = []
        self.recovery = Recovery(self._form_group)
        self._members: Membership | None = None
        self._watchdog: Watchdog | None = None
        self._trainer: pl.Trainer | None = None
        self._sync: ProcessGroupSync | None = None

    # -- the start ---------------------------------------------------------------------------------------------------

    def start(self, endpoint: str, asked_for: int, hosts_store: bool) -> None:
        """Begin a run with others, or get ready to take over theirs. After a run that has ended, begin the next one.

        Args:
            endpoint: ``"host:port"`` of the store.
            asked_for: Number of replicas for which the run waits before it begins, half a minute at most.
            hosts_store: Whether to start the store.

        Raises:
            MisconfigurationException: There is no store.
            ReplicaLostError: There are fewer than ``min_replicas``.
        """
        if self._members is None and hosts_store:
            command = [sys.executable, "-m", "lightning_curvadion", "store", "--port", endpoint.rpartition(":")[2]]
            # It outlives this process and its terminal, and holds nothing of them open.
            quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
            subprocess.Popen([*command, "--idle", str(_IDLE)], start_new_session=True, **quiet)  # type: ignore[call-overload]
        if dist.is_initialized():
            # Of an earlier run of this process.
            dist.destroy_process_group()
        self.has_begun = True
        try:
            members = self._members = self._newest_run(endpoint)
        except RuntimeError as error:
            raise MisconfigurationException(
                f"no store answers at {endpoint}: start `python -m lightning_curvadion store --port"
                f" {endpoint.rpartition(':')[2]}` there, and name it by MASTER_ADDR and MASTER_PORT on every machine"
            ) from error
        store = members.store
        deadline = time.monotonic() + _START.total_seconds()
        waits = not store.check(["size"])
        store.add("started", 1)
        while waits and store.add("started", 0) < asked_for and time.monotonic() < deadline:
            time.sleep(0.05)
            waits = not store.check(["size"])
        group = None
        if waits:
            group = self._in_time(lambda: members.form_group([], {"place": "start"}, lambda group: group, waits=False))
        self.is_newcomer = group is None
        if group is None:
            # It is not the first one, which would write logs and checkpoints.
            self.rank = self.size = int(store.get("size"))
        else:
            self._set_place(group)
        self._set_rank_zero()

    def _newest_run(self, endpoint: str) -> Membership:
        """The run of the store that goes on, or the next one."""
        number = 0
        while True:
            members = Membership(
                endpoint,
                self._min_replicas,
                run_id=run_name(number),
                timeout=self._timeout,
                join_timeout=self._join_timeout,
            )
            if not (members.store.check(["size"]) and members.is_over()):
                return members
            members.leave()
            number += 1

    def attach(self, trainer: "pl.Trainer", sync: ProcessGroupSync) -> None:
        """Let the steps of a run recover from now on."""
        self._trainer, self._sync = trainer, sync
        self.changes.clear()
        if not self.is_newcomer:
            self.changes.append(MembershipChange("start", self.size, 0, 0, 0.0))
        sync.recovery = self.recovery

    def share_out(self, dataloader: Any, trains: bool) -> Any:
        """The same dataloader with a sampler that follows the membership, where Lightning has given it one."""
        sampler = getattr(dataloader, "sampler", None)
        if not isinstance(dataloader, DataLoader) or type(sampler) is not DistributedSampler:
            return dataloader
        if not trains:
            return with_sampler(dataloader, MemberEvaluationSampler(cast(Sized, sampler.dataset), self._place))
        batch_size = getattr(dataloader.batch_sampler, "batch_size", None) or 1
        return with_sampler(
            dataloader,
            MemberSampler(cast(Sized, sampler.dataset), batch_size, sampler.shuffle, sampler.seed, self._place),
        )

    @property
    def _samplers(self) -> list[MemberSampler]:
        """Of the training dataloaders, which may be reloaded."""
        assert self._trainer is not None
        loaders = train_dataloaders(self._trainer)
        return [loader.sampler for loader in loaders if isinstance(getattr(loader, "sampler", None), MemberSampler)]

    def _place(self) -> tuple[int, int]:
        return (self.rank, self.size) if not self.is_newcomer else (0, self.size)

    def begin_training(self) -> None:
        """Called where the others begin to train too."""
        assert self._members is not None
        self.recovery.active = not self.is_newcomer
        self._watch()

    def end_training(self) -> None:
        """Called where the others end it too: whoever is lost from now on is an error."""
        self.recovery.active = self.has_begun = False
        self._rest()
        if self._members is not None and not self.has_left:
            self._members.end()

    def feed_watchdog(self) -> None:
        """Called with every batch: a replica that stands still in one is to be lost for the others."""
        if self._watchdog is not None:
            self._watchdog.feed()

    def run_jointly(self, operation: Callable[[], T]) -> T:
        """Run what all replicas run, in a new group again where one is lost in it."""
        if self._watchdog is not None:
            # Collectives have a timeout of their own, and what writes a checkpoint takes its time.
            self._watchdog.pause()
        try:
            return self.recovery.run(operation)
        finally:
            self.feed_watchdog()

    def _watch(self) -> None:
        assert self._members is not None
        self._watchdog = Watchdog(_STILL * self._timeout.total_seconds(), self._members.fall_silent)
        self._watchdog.start()

    def _rest(self) -> None:
        if self._watchdog is not None:
            self._watchdog.end()

    # -- in the loop -------------------------------------------------------------------------------------------------

    def begin_epoch(self) -> None:
        """Called before the first batch of an epoch."""
        assert self._trainer is not None and self._members is not None and self._sync is not None
        if self.is_newcomer:
            members, sync = self._members, self._sync
            self._in_time(lambda: members.catch_up(sync))
            self._form_group({"place": "batch"})
        update_epoch_length(self._trainer, begins=True)

    def begin_batch(self) -> None:
        """Called before every batch: others that wait take part from here on."""
        assert self._members is not None and self._sync is not None
        self.feed_watchdog()
        agreement = self._sync.agreement
        if agreement.agreed_request == REGROUP:
            self.recovery.meet_newcomers()
            agreement = self._sync.agreement
            agreement.agreed_request = 0.0
            if agreement.stop_request == REGROUP:
                agreement.stop_request = 0.0
        elif self.rank == 0 and self._members.waiting(self._sync):
            agreement.stop_request = agreement.stop_request or REGROUP

    def leave(self) -> None:
        """Take no part any more."""
        assert self._members is not None
        self.has_left, self.recovery.active = True, False
        self._rest()
        self._members.leave()

    def _form_group(self, own: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Form a group of those that are there, and train one model from where the furthest is.

        Returns:
            Where each stands that has trained before.
        """
        assert self._members is not None and self._sync is not None and self._trainer is not None
        start, members = time.perf_counter(), self._members
        batches = batches_begun(self._trainer)
        standing = {
            **own,
            "request": self._sync.agreement.agreed_request,
            "triggers": [optimizer._cap.state_dict() for optimizer in self._sync.optimizers],
            "drawn": [sampler.drawn(batches) for sampler in self._samplers],
        }
        structure = structure_of(self._sync)
        takes_over = self.is_newcomer
        formed = self._in_time(
            lambda: members.form_group(structure, standing, self._make_one_model, takes_over=takes_over)
        )
        assert formed is not None, "it waits until it is in"
        group, self.is_newcomer = formed.group, False
        standings = group.standings[: group.trained]
        self._set_place(group)
        if group.is_newcomer:
            hand_over.unpack(self._trainer, formed.handed_over)
        furthest = max(standings, key=lambda one: one["position"])
        self._sync.resume_triggers(furthest["triggers"])
        self._sync.agreement.agreed_request = furthest["request"] if not group.is_newcomer else 0.0
        skipped = self._divide(group)
        if group.is_newcomer:
            self.recovery.take_over(furthest["position"])
            restart_data(self._trainer)
        update_epoch_length(self._trainer)
        self._note(group, time.perf_counter() - start, skipped)
        return standings

    def _make_one_model(self, group: Group) -> _Formed:
        assert self._sync is not None and self._trainer is not None
        handed_over = b""
        if group.size > group.trained:
            handed_over = group.exchange("state", hand_over.pack(self._trainer) if group.rank == 0 else b"")
            states = group.exchange("optimizers", json.dumps(plain_state(self._sync.optimizers)).encode())
            if group.is_newcomer:
                load_plain_state(self._sync.optimizers, json.loads(states))
        self._sync.regroup(group.trained)
        averages = moving_averages(self._trainer.callbacks)  # type: ignore[attr-defined]
        if averages and group.size > group.trained:
            self._sync.take_from_rank_0(averages)
        return _Formed(group, handed_over)

    def _divide(self, group: Group) -> int:
        skipped = 0
        assert self._sync is not None and self._trainer is not None
        # With a lag the loss shows so many steps later.
        unsure = (1 + self._sync.settings.lag) * self._trainer.accumulate_grad_batches
        for number, sampler in enumerate(self._samplers):
            trained = [Drawn(*one["drawn"][number]) for one in group.standings[: group.trained]]
            skipped += sampler.divide(trained, group.rank, group.size, group.lost, unsure)
        return skipped

    def _set_place(self, group: Group) -> None:
        assert self._members is not None
        takes_over_logs = group.rank == 0 < self.rank
        self.rank, self.size = group.rank, group.size
        self._set_rank_zero()
        if self.rank == 0:
            self._members.store.set("size", str(self.size))
        if takes_over_logs and self._trainer is not None:
            for logger in self._trainer.loggers:
                log_beside(logger)

    def _set_rank_zero(self) -> None:
        rank_zero_only.rank = rank_zero.rank_zero_only.rank = self.rank  # type: ignore[attr-defined]

    def _note(self, group: Group, seconds: float, skipped: int) -> None:
        joined = group.size - group.trained
        if group.lost or joined:
            kind = "loss" if group.lost else "join"
            self.changes.append(MembershipChange(kind, group.size, group.lost, joined, seconds, skipped))  # type: ignore[arg-type]
            rank_zero_info(
                f"{group.size} replicas train on after {seconds:.1f} s: {group.lost} lost, {joined} new."
                f" At most {skipped} samples that lost ones had drawn are skipped in this epoch; others are shared out."
            )

    def _in_time(self, form: Callable[[], T]) -> T:
        """Raises one clear error where too few replicas come, and ends where this one is to leave."""
        self._rest()
        self.forming = True
        try:
            return form()
        except RendezvousTimeoutError:
            raise ReplicaLostError(
                f"Start more replicas, or lower min_replicas: fewer than {self._min_replicas} came within"
                f" {self._join_timeout}"
            ) from None
        except RendezvousClosedError:
            raise ReplicaLostError("The run has ended: this replica came too late, or was taken for lost") from None
        finally:
            self.forming = False
            if self.recovery.active:
                self._watch()

    def interrupt(self) -> None:
        """Called by a signal handler: a replica that waits for others leaves at once."""
        if self.forming:
            raise SIGTERMException
