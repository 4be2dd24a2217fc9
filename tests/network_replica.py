"""One replica of test_network.py, run in its own network namespace: counts what the kernel sent beside ``bytes_sent``.

python network_replica.py RANK STORE INTERFACE SETTINGS_JSON
"""

import datetime
import json
import subprocess
import sys

import torch
import torch.distributed as dist
from models import build, train_step

from lightning_curvadion import EveryNSteps


def kernel_sent(interface: str) -> int:
    shown = subprocess.run(["ip", "-s", "-j", "link", "show", "dev", interface], capture_output=True, check=True)
    return json.loads(shown.stdout)[0]["stats64"]["tx"]["bytes"]


def main() -> None:
    rank, store, interface, settings = int(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=30)
    )
    model, optimizer = build(layers=24, hook=settings, trigger=EveryNSteps(10))
    sync = optimizer.sync_hook
    train_step(model, optimizer, 0, rank)  # the first collective opens connections
    counted = {}
    step = 1
    for phase, steps in (("local", 8), ("sync", 1), ("local again", 9), ("sync again", 1)):
        dist.barrier()
        kernel, payload = kernel_sent(interface), sync.bytes_sent
        for _ in range(steps):
            train_step(model, optimizer, step, rank)
            step += 1
            assert optimizer.last_step.synced == phase.startswith("sync")
        dist.barrier()
        counted[phase] = (kernel_sent(interface) - kernel, sync.bytes_sent - payload, steps)
    dist.destroy_process_group()
    print(json.dumps(counted))


if __name__ == "__main__":
    main()
