"""The command line: ``python -m lightning_curvadion {fit,validate,test,predict} --config FILE``."""

from lightning.pytorch.cli import ArgsType, LightningCLI


def main(args: ArgsType = None) -> LightningCLI:
    """Run LightningCLI with the model, data, strategy and callbacks that the config names.

    Args:
        args: Command-line arguments; ``None`` takes those of the process.

    Returns:
        The command line, with the Trainer and the model it ran.
    """
    return LightningCLI(save_config_kwargs={"overwrite": True}, seed_everything_default=0, args=args)
