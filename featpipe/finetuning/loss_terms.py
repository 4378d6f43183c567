"""Terms that callers add to the training loss."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn


class LossTerm:
    """An addition to the training loss; a subclass overrides one method or both."""

    def row_losses(self, scores: Tensor, rows: NDArray[np.int64]) -> Tensor | float:
        """Return what is added to the loss of each row, before the rows are weighted and averaged.

        Parameters
        ----------
        scores : Tensor of shape (b, k)
        rows : ndarray of shape (b,), int64
            Rows of the archive.

        Returns
        -------
        Tensor of shape (b,) or float
        """
        return 0.0

    def penalty(self, parameters: Mapping[str, nn.Parameter]) -> Tensor | None:
        """Return what is added once to the mean loss of each batch; None if nothing.

        Parameters
        ----------
        parameters : mapping from name to Parameter
            As :meth:`featpipe.finetuning.Trainer.trained_parameters` names them.
        """
        return None
