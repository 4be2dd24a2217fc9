"""A replica of a run that others leave and join: ``test_membership.py`` starts some, and kills and adds others.

    python elastic_replica.py NAME JSON

It prints a line of JSON for each group that it becomes a member of, every ten steps, and at its end: after some steps,
or 50 steps after a group of some size has formed in the middle of the run.
"""

import datetime
import json
import os
import random
import signal
import sys
import time

import torch
from launching import ROOT
from models import Net, train_step
from torch import Tensor, nn
from training import fingerprint

from examples.byte_gpt import GPT, StandardLibrary, Windows, warmup_and_cooldown
from lightning_curvadion import CurvaDion, IntegratedRMMC, ProcessGroupSync, split_parameters
from lightning_curvadion.sync.collectives import bytes_of
from lightning_curvadion.sync.connection import Connection
from lightning_curvadion.sync.errors import ReplicaLostError
from lightning_curvadion.sync.membership import Membership
from lightning_curvadion.sync.parameter_payloads import ParameterPayloads


class Text:
    """A byte-level GPT on Python's standard library."""

    def __init__(self, options: dict) -> None:
        data = StandardLibrary(context=64, cache=str(ROOT / ".data"))
        self.train, self.val = (Windows(data.cache / f"{part}.bin", 65, 64) for part in ("train", "val"))
        self.steps = options["steps"]
        self.model = GPT(layers=2, width=64, heads=4, context=64)
        self.optimizer = CurvaDion(split_parameters(self.model), lr=0.02)
        # No two replicas draw the same windows.
        self.choice = random.Random()

    def loss_of(self, windows: list[int], data: Windows) -> Tensor:
        batch = torch.stack([data[number] for number in windows])
        return nn.functional.cross_entropy(self.model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def step(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = 0.02 * warmup_and_cooldown(step, self.steps)
        self.optimizer.zero_grad()
        self.loss_of([self.choice.randrange(len(self.train)) for _ in range(8)], self.train).backward()
        self.optimizer.step()

    def loss(self) -> Tensor:
        return self.loss_of(list(range(0, len(self.val), len(self.val) // 512)), self.val)


class Tokens:
    """A small net that learns a function of eleven tokens."""

    def __init__(self, options: dict) -> None:
        self.model = Net(layers=options.get("layers", 2), width=options.get("width", 16))
        self.optimizer = CurvaDion(split_parameters(self.model), lr=0.02, trigger=IntegratedRMMC(0.45))
        self.shard = random.randrange(1000)

    def step(self, step: int) -> None:
        train_step(self.model, self.optimizer, step, self.shard)

    def loss(self) -> Tensor:
        tokens = torch.arange(11).repeat(4)
        return nn.functional.cross_entropy(self.model(tokens), (3 * tokens + 1) % 11)


def main() -> None:
    name, options = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(1)
    members = Membership(
        options["endpoint"],
        min_replicas=options["min_replicas"],
        timeout=datetime.timedelta(seconds=options.get("timeout", 10)),
        join_timeout=datetime.timedelta(seconds=options.get("join_timeout", 60)),
    )
    # Nobody has what a new replica begins with.
    torch.seed()
    task = Text(options) if options.get("text") else Tokens(options)
    model, optimizer = task.model, task.optimizer
    optimizer.register_sync_hook(sync := ProcessGroupSync(**options["hook"]))
    sync.include_module(model)

    end = options["steps"]
    catch_up, send = members.catch_up, Connection._send
    said: list[None] = []

    def caught_up(sync: ProcessGroupSync) -> bool:
        start = time.perf_counter()
        result = catch_up(sync)
        print(json.dumps({"caught up": result, "seconds": time.perf_counter() - start}), flush=True)
        return result

    def send_slowly(connection: Connection, tensor: Tensor) -> None:
        for part in bytes_of(tensor).split(2**20):
            time.sleep(options["seconds_a_megabyte"] * part.numel() / 2**20)
            if not said:
                said.append(print(json.dumps({"sends": True}), flush=True))
            send(connection, part)

    members.catch_up = caught_up  # type: ignore[method-assign]
    if options.get("as_before"):
        # The model at full width after every change.
        members.catch_up = lambda sync: print(json.dumps({"caught up": False}))  # type: ignore[method-assign]
        ParameterPayloads.are_whole = lambda *_: False  # type: ignore[method-assign]
    if "seconds_a_megabyte" in options:
        Connection._send = send_slowly  # type: ignore[method-assign]

    def join(step: int, why: str) -> int:
        nonlocal end
        sent = sync.bytes_sent
        step = members.join(sync, {"step": step})["step"]
        # Since its last step.
        seconds = time.perf_counter() - last
        line = {"step": step, "size": members.size, "why": why, "seconds": seconds, "sent": sync.bytes_sent - sent}
        print(json.dumps(line), flush=True)
        if step > 0 and members.size == options.get("until"):
            end = step + 50
        return step

    last = time.perf_counter()
    longest = 0.0
    step = join(0, "start")
    last = time.perf_counter()
    while step < end:
        try:
            task.step(step)
            time.sleep(options.get("sleep", 0.01))
            step += 1
            longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
            if step % 10 == 0:
                print(json.dumps({"step": step, "size": members.size, "longest": longest}), flush=True)
                longest = 0.0
            if step == options.get("kill_at", {}).get(name):
                os.kill(os.getpid(), signal.SIGKILL)
            if not members.should_regroup(sync):
                continue
            why = "join"
        except ReplicaLostError:
            why = "loss"
        step = join(step, why)
        last = time.perf_counter()
    sync.reach_consensus(optimizer, include_state=True)
    with torch.no_grad():
        loss = task.loss().item()
    digest = fingerprint([*model.parameters(), *model.buffers()])
    print(json.dumps({"end": step, "digest": digest, "loss": loss, "size": members.size}), flush=True)
    members.close()


if __name__ == "__main__":
    main()
