"""One replica of ``test_network.py``, on its own host of the lab. Measures the kernel's bytes beside ``bytes_sent``.

Where a host has several processes, they are one replica.

RANK=... WORLD_SIZE=... LOCAL_WORLD_SIZE=... python network_replica.py FOLDER SETTINGS_BY_MODEL_JSON HOST
"""

import datetime
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lab_replicas import kernel_sent, move_to_host
from models import Net, build, exact_sync, train_step
from torch import nn
from two_levels import attach

from examples.byte_gpt import GPT, WHOLE
from lightning_curvadion import CurvaDion, EveryNSteps, split_parameters

# Steps from one sync to the next. The sync steps of the GPT are compared with each other, so that few are enough there.
PERIODS = {"small": 10, "gpt": 3}


def build_gpt(hook: dict, trigger: EveryNSteps) -> tuple[GPT, CurvaDion]:
    """The model of the main job."""
    torch.manual_seed(0)
    model = GPT(layers=4, width=96, heads=4, context=128)
    optimizer = CurvaDion(split_parameters(model, options=WHOLE), trigger=trigger)
    optimizer.register_sync_hook(exact_sync(**hook))
    return model, optimizer


def train_gpt(model: nn.Module, optimizer: CurvaDion, step: int, shard: int) -> None:
    generator = torch.Generator().manual_seed(1000 * shard + step)
    tokens = torch.randint(0, 256, (1, 33), generator=generator)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    optimizer.step()


def measure(rank: int, model_name: str, hook: dict) -> dict[str, tuple[int, int, int]]:
    """(kernel bytes, payload, steps) of each phase."""
    period = PERIODS[model_name]
    trigger = EveryNSteps(period)
    processes = int(os.environ["LOCAL_WORLD_SIZE"])
    model: nn.Module
    if processes > 1:
        torch.manual_seed(0)
        (model, optimizer), train = (
            attach(dist.get_world_size(), processes, Net(24), hook, trigger=trigger),
            train_step,
        )
    elif model_name == "gpt":
        (model, optimizer), train = build_gpt(hook, trigger), train_gpt
    else:
        (model, optimizer), train = build(layers=24, hook=hook, trigger=trigger), train_step
    sync = optimizer.sync_hook
    train(model, optimizer, 0, rank)  # the first collective opens connections
    measured = {}
    step = 1
    for phase, steps in (("local", period - 2), ("sync", 1), ("local again", period - 1), ("sync again", 1)):
        dist.barrier()
        kernel, payload = kernel_sent(), sync.bytes_sent
        for _ in range(steps):
            train(model, optimizer, step, rank)
            step += 1
            assert optimizer.last_step.synced == phase.startswith("sync")
        dist.barrier()
        measured[phase] = (kernel_sent() - kernel, sync.bytes_sent - payload, steps)
    return measured


def main() -> None:
    folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    move_to_host(sys.argv[3])
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    rank = dist.get_rank()
    measured = {
        model_name: [measure(rank, model_name, hook) for hook in hooks] for model_name, hooks in settings.items()
    }
    dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
