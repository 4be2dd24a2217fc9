"""The settings of a run, as its loggers and LightningCLI wrote them beside the logs."""

from pathlib import Path

# What LightningCLI writes is complete; hyperparameters are what the module and the monitor gave to the logger.
_FILES = ("config.yaml", "hparams.yaml")


def read_settings(folder: Path) -> str:
    """The texts of the settings in a folder of logs; empty if there are none.

    Example::

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "hparams.yaml").write_text("width: 96\\n")
        ...     read_settings(Path(folder))
        'width: 96'
    """
    texts = [(folder / name).read_text(errors="replace").strip() for name in _FILES if (folder / name).is_file()]
    return "\n\n".join(text for text in texts if text not in ("", "{}"))
