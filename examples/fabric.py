"""CurvaDion under Lightning Fabric: your own loop, Fabric's launcher, devices, precision and samplers.

python examples/fabric.py
"""

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvadion import CurvaDion, ProcessGroupSync, split_parameters


class Unwrapped(DDPStrategy):
    """Fabric's DDP but for one thing: no reducer around the module, so that ``backward`` stays on its replica."""

    def setup_module(self, module: nn.Module) -> nn.Module:  # type: ignore[override]
        """The module as it is, instead of ``DistributedDataParallel(module)``."""
        return module


def spread(model: nn.Module) -> float:
    """The largest distance of a parameter between two replicas."""
    own = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    return max((other - own).abs().max().item() for other in everyone)


def main() -> None:
    """Fit the labels of a linear teacher, two replicas."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy=Unwrapped())
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    x = torch.randn(4096, 32)
    data = TensorDataset(x, (x @ torch.randn(32, 10)).argmax(dim=1))
    net = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    curvadion = CurvaDion(split_parameters(net), lr=0.01)
    model, optimizer = fabric.setup(net, curvadion)
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=32, shuffle=True))
    # Once the parameters are on their device.
    sync = ProcessGroupSync(wire_format="sign", momentum="local")  # what the Lightning strategy does by default
    curvadion.register_sync_hook(sync)  # on the optimizer itself, of which Fabric has returned a wrapper
    sync.include_module(net)

    steps, syncs, apart = 0, 0, 0.0
    losses: list[float] = []
    for _ in range(3):
        for images, labels in loader:
            loss: Tensor = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
            assert curvadion.last_step is not None
            steps, syncs = steps + 1, syncs + curvadion.last_step.synced
            if not curvadion.last_step.synced and not apart:
                apart = spread(net)
            losses.append(loss.item())
    sync.reach_consensus(curvadion, include_state=True)  # before a checkpoint or an evaluation
    together = spread(net)

    fabric.print(
        f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {syncs} sync steps of {steps}, {sync.bytes_sent / 1e6:.2f} MB sent"
        f"\nparameters of the two replicas: {apart:.2g} apart after a local step, {together:.2g} after the consensus"
    )


if __name__ == "__main__":
    main()
