"""Losses and scores by epoch for TensorBoard, where that is installed."""

from __future__ import annotations

import os
from collections.abc import Callable

from featpipe.errors import ConfigError
from featpipe.finetuning.state import EpochRecord

__all__ = ["make_tensorboard_logger"]


def make_tensorboard_logger(folder: str | os.PathLike[str]) -> Callable[[EpochRecord], None]:
    """What writes an epoch into a folder.

    Raises
    ------
    ConfigError
        If TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            f"{folder}: TensorBoard is not installed; pip install tensorboard, or leave --tensorboard out"
        ) from None

    def log_epoch(epoch: EpochRecord) -> None:
        with SummaryWriter(os.fspath(folder)) as writer:
            for name, value in epoch.to_dict().items():
                if name != "number" and value is not None:
                    writer.add_scalar(name, value, epoch.number)

    return log_epoch
