"""What the nearest neighbours of a row count."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["nearness"]

SIMILARITY_TEMPERATURE = 0.07


def nearness(distances: NDArray[np.floating]) -> NDArray[np.floating]:
    """Weights of neighbours at some cosine distances: the exponential of their similarity over 0.07.

    As Wu, Xiong, Yu and Lin, "Unsupervised feature learning via non-parametric instance discrimination" (CVPR 2018)
    weigh them. Unlike the inverse of a distance it does not let a copy of an image silence all others.

    Parameters
    ----------
    distances : ndarray of shape (m, n_neighbors)

    Returns
    -------
    ndarray of the same shape
    """
    import numpy as np  # here, because the table of heads names this function, and is shown without numpy

    return np.asarray(np.exp(-distances / SIMILARITY_TEMPERATURE))


nearness.__module__ = "featpipe.heads"
