"""Losses and scores by epoch for TensorBoard, where that is installed."""

from __future__ import annotations

import os
from collections.abc import Callable

from featpipe.errors import ConfigError
from featpipe.finetuning.state import Epoch

__all__ = ["board"]


def board(folder: str | os.PathLike[str]) -> Callable[[Epoch], None]:
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

    def write(epoch: Epoch) -> None:
        with SummaryWriter(os.fspath(folder)) as writer:
            for name, value in epoch.facts().items():
                if name != "number" and value is not None:
                    writer.add_scalar(name, value, epoch.number)

    return write
