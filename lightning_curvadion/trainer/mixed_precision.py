"""Mixed precision in float16: all replicas use one loss scale, and skip a step together."""

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler


def share_gradient_scaler(plugin: Precision, device: torch.device) -> None:
    """Replace the gradient scaler of a precision plugin by one that all replicas share.

    Where the gradients of one replica overflow, all replicas skip the step and lower the scale. It costs 4 bytes a
    step.

    Args:
        plugin: Changed in place; plugins without a scaler are left alone.
        device: Of this replica.
    """
    if not isinstance(plugin, MixedPrecision) or plugin.scaler is None or isinstance(plugin.scaler, ShardedGradScaler):
        return
    own = plugin.scaler
    plugin.scaler = ShardedGradScaler(
        device.type,
        init_scale=own.get_scale(),
        growth_factor=own.get_growth_factor(),
        backoff_factor=own.get_backoff_factor(),
        growth_interval=own.get_growth_interval(),
        enabled=own.is_enabled(),
        process_group=None,
    )


def refuse_gradient_scaler(plugin: Precision) -> None:
    """Check that a precision has no loss scale, whose collectives belong to one process group.

    Raises:
        MisconfigurationException: It has one.
    """
    if isinstance(plugin, MixedPrecision) and plugin.scaler is not None:
        raise MisconfigurationException(
            'elastic=True: the loss scale of precision="16-mixed" belongs to replicas that stay; use "bf16-mixed"'
        )
