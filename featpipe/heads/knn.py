"""Distance weights for nearest-neighbour heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SIMILARITY_TEMPERATURE = 0.07


def nearness(distances: NDArray[np.floating]) -> NDArray[np.floating]:
    """Weights of neighbours from their cosine distances: exp(similarity / 0.07), up to a constant factor.

    These are the weights of Wu, Xiong, Yu and Lin, "Unsupervised feature learning via non-parametric instance
    discrimination" (CVPR 2018). Unlike inverse distances they do not let a copy of an image outweigh all others.

    Parameters
    ----------
    distances : ndarray of shape (m, n_neighbors)

    Returns
    -------
    ndarray of the same shape
    """
    import numpy as np  # here: the registry needs this function, and listing heads needs no numpy

    return np.asarray(np.exp(-distances / SIMILARITY_TEMPERATURE))


nearness.__module__ = "featpipe.heads"
