"""One replica of test_network.py, run in its own network namespace: counts what the kernel sent beside ``bytes_sent``.

python network_replica.py RANK STORE INTERFACE MODEL LIST_OF_SETTINGS_JSON
"""

import datetime
import json
import subprocess
import sys

import torch
import torch.distributed as dist
from models import build, train_step
from torch import nn

from examples.byte_gpt import GPT
from lightning_curvadion import CurvaDion, EveryNSteps, ProcessGroupSync, split_parameters


def kernel_sent(interface: str) -> int:
    shown = subprocess.run(["ip", "-s", "-j", "link", "show", "dev", interface], capture_output=True, check=True)
    return json.loads(shown.stdout)[0]["stats64"]["tx"]["bytes"]


def build_gpt(hook: dict, trigger: EveryNSteps) -> tuple[GPT, CurvaDion]:
    """The model of the main job."""
    torch.manual_seed(0)
    model = GPT(layers=4, width=96, heads=4, context=128)
    optimizer = CurvaDion(split_parameters(model), trigger=trigger)
    optimizer.register_sync_hook(ProcessGroupSync(**hook))
    return model, optimizer


def train_gpt(model: nn.Module, optimizer: CurvaDion, step: int, shard: int) -> None:
    generator = torch.Generator().manual_seed(1000 * shard + step)
    tokens = torch.randint(0, 256, (1, 33), generator=generator)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    optimizer.step()


def count(rank: int, interface: str, model_name: str, settings: dict) -> dict[str, tuple[int, int, int]]:
    """(kernel bytes, payload, steps) of each phase."""
    trigger = EveryNSteps(10)
    if model_name == "gpt":
        (model, optimizer), train = build_gpt(settings, trigger), train_gpt
    else:
        (model, optimizer), train = build(layers=24, hook=settings, trigger=trigger), train_step
    sync = optimizer.sync_hook
    train(model, optimizer, 0, rank)  # the first collective opens connections
    counted = {}
    step = 1
    for phase, steps in (("local", 8), ("sync", 1), ("local again", 9), ("sync again", 1)):
        dist.barrier()
        kernel, payload = kernel_sent(interface), sync.bytes_sent
        for _ in range(steps):
            train(model, optimizer, step, rank)
            step += 1
            assert optimizer.last_step.synced == phase.startswith("sync")
        dist.barrier()
        counted[phase] = (kernel_sent(interface) - kernel, sync.bytes_sent - payload, steps)
    return counted


def main() -> None:
    rank, store, interface, model_name, settings = int(sys.argv[1]), *sys.argv[2:5], json.loads(sys.argv[5])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=30)
    )
    counted = [count(rank, interface, model_name, hook) for hook in settings]
    dist.destroy_process_group()
    print(json.dumps(counted))


if __name__ == "__main__":
    main()
