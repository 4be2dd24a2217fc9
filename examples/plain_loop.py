"""CurvaDion in a plain torch loop, without Lightning.

torchrun --standalone --nproc-per-node 2 examples/plain_loop.py
"""

import torch
import torch.distributed as dist
from torch import nn

from lightning_curvadion import CurvaDion, ProcessGroupSync, split_parameters


def main() -> None:
    """Fit the labels of a linear teacher; each rank draws its own data."""
    dist.init_process_group("gloo")  # and no DistributedDataParallel: it would send all gradients as well
    torch.manual_seed(0)
    teacher = torch.randn(32, 10)
    model = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    optimizer = CurvaDion(split_parameters(model), lr=0.01)
    sync = ProcessGroupSync()
    optimizer.register_sync_hook(sync)  # verifies that all ranks hold the same model, and broadcasts rank 0's values
    sync.include_module(model)  # synchronises its buffers too

    torch.manual_seed(dist.get_rank())
    losses, syncs = [], 0
    for _ in range(200):
        x = torch.randn(64, 32)
        loss = nn.functional.cross_entropy(model(x), (x @ teacher).argmax(dim=1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert optimizer.last_step is not None
        syncs += optimizer.last_step.synced
    sent_in_steps = sync.bytes_sent / 1e6
    sync.reach_consensus(optimizer, include_state=True)  # before a checkpoint or an evaluation

    if dist.get_rank() == 0:
        sent, gradients = sync.bytes_sent / 1e6, sum(p.nbytes for p in model.parameters()) / 1e6
        print(
            f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {syncs} sync steps of 200\n"
            f"{sent:.2f} MB sent, {sent_in_steps:.2f} of them in steps; DDP would have sent {200 * gradients:.2f} MB"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
