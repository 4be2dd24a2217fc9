"""A model that two processes share: what each of them holds, beside two that hold all of it.

python examples/sharded.py

Four processes of this machine are two replicas of two processes, first with ``DistributedDataParallel`` inside of each,
then with ``fully_shard``. At full width both train alike up to rounding. On GPUs: ``--accelerator gpu``.
"""

import argparse
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.byte_gpt import ByteGPT, StandardLibrary
from lightning_curvadion import CurvaDion, CurvaDionStrategy

PROCESSES, REPLICA_SIZE = 4, 2


class ShardedGPT(ByteGPT):
    """A :class:`ByteGPT` that the processes of a replica may share.

    Args:
        sharded: Whether they do.
        **arguments: Of :class:`ByteGPT`.
    """

    def __init__(self, sharded: bool, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.sharded, self.done = sharded, False

    def configure_model(self) -> None:
        """Shard each block by itself, so that one at a time is gathered, and then all the rest."""
        # Lightning calls it for each run of a Trainer.
        if not self.sharded or self.done:
            return
        # Seconds to import.
        from torch.distributed.fsdp import fully_shard

        assert self.device_mesh is not None, "replica_size gives a mesh"
        mesh = self.device_mesh["data_parallel"]
        for block in self.gpt.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.gpt, mesh=mesh)
        self.done = True


def bytes_here(tensor: Tensor) -> int:
    """Memory of a tensor in this process."""
    own = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return own.numel() * own.element_size()


def train(sharded: bool, options: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Train.

    Returns:
        The weights, whole and on the CPU, and what this process holds in MB, with the loss.
    """
    pl.seed_everything(0, verbose=False)
    module = ShardedGPT(sharded, layers=options.layers, width=options.width)
    # At full width, so that the two runs can be compared. The default sends one bit a number.
    strategy = CurvaDionStrategy(replica_size=REPLICA_SIZE, wire_format="float32")
    trainer = pl.Trainer(
        accelerator=options.accelerator,
        devices=PROCESSES,
        strategy=strategy,
        max_steps=options.steps,
        limit_val_batches=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = StandardLibrary(context=64, batch_size=4)
    trainer.fit(module, data)
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, CurvaDion)
    state = [value for own in optimizer.state.values() for value in own.values() if isinstance(value, Tensor)]
    memory = {
        "parameters": sum(map(bytes_here, module.parameters())) / 1e6,
        "state": sum(map(bytes_here, state)) / 1e6,
        "last consensus": strategy.sync.anchor_bytes / 1e6,
    }
    (losses,) = trainer.validate(module, data, verbose=False)
    whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in module.named_parameters()}
    return {name: parameter.detach().cpu().clone() for name, parameter in whole.items()}, {**memory, **losses}


def main() -> None:
    """Train both ways and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--accelerator", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # The validation data divide evenly.
    warnings.filterwarnings("ignore", message=".*Using `DistributedSampler`")
    (whole, held_whole), (sharded, held_sharded) = train(False, options), train(True, options)
    if torch.distributed.get_rank() != 0:
        return
    print("\nMB in each process   whole  sharded")
    for name in ("parameters", "state", "last consensus"):
        print(f"  {name:<16}  {held_whole[name]:6.2f}   {held_sharded[name]:6.2f}")
    losses = f"{held_whole['val_loss']:.4f} whole, {held_sharded['val_loss']:.4f} sharded"
    print(f"val_loss after {options.steps} steps: {losses}")
    farthest = max(float((whole[name] - sharded[name]).abs().max()) for name in whole)
    print(f"farthest weight: {farthest:.1e}")


if __name__ == "__main__":
    main()
