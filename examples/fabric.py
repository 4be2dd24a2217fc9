"""CurvaDion under Lightning Fabric: your own loop with Fabric's launcher, devices, precision and samplers.

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
    """Fabric's DDP without the reducer: ``backward`` sends nothing."""

    def setup_module(self, module: nn.Module) -> nn.Module:  # type: ignore[override]
        """Return the module itself, not ``DistributedDataParallel(module)``."""
        return module


def drift(model: nn.Module) -> float:
    """Largest difference of a parameter between two replicas."""
    own = nn.utils.parameters_to_vector(model.parameters()).detach()
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    return max((other - own).abs().max().item() for other in gathered)


def main() -> None:
    """Fit the labels of a linear teacher on two replicas."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy=Unwrapped())
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    x = torch.randn(4096, 32)
    data = TensorDataset(x, (x @ torch.randn(32, 10)).argmax(dim=1))
    net = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    curvadion = CurvaDion(split_parameters(net), lr=0.01)
    model, optimizer = fabric.setup(net, curvadion)
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=32, shuffle=True))
    # After fabric.setup, which moves the parameters to their device.
    sync = ProcessGroupSync()
    curvadion.register_sync_hook(sync)  # on the optimizer itself, not on Fabric's wrapper of it
    sync.include_module(net)

    losses: list[float] = []
    syncs, local_drift = 0, 0.0
    for _ in range(3):
        for inputs, labels in loader:
            loss: Tensor = nn.functional.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
            assert curvadion.last_step is not None
            losses.append(loss.item())
            syncs += curvadion.last_step.synced
            if not curvadion.last_step.synced and not local_drift:
                local_drift = drift(net)
    sync.reach_consensus(curvadion, include_state=True)  # before a checkpoint or an evaluation
    consensus_drift = drift(net)

    megabytes = sync.bytes_sent / 1e6
    fabric.print(
        f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {syncs} sync steps of {len(losses)}, {megabytes:.2f} MB sent\n"
        f"drift between the replicas: {local_drift:.2g} after a local step, {consensus_drift:.2g} after the consensus"
    )


if __name__ == "__main__":
    main()
