"""Embeddings in the plane."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["projected"]

FITTED_ON = 5000  # rows
STANDS_OUT = 99.5  # percentile of the distance from the middle, at which the map ends


def projected(X: NDArray[np.float32]) -> tuple[NDArray[np.float64], str]:
    """Two coordinates for each row, within -1 and 1, and how they were found.

    The two directions in which the embeddings vary most: the same on every machine and in a second, and what is near in
    the map need not be near in the embedding, which the page says.

    Parameters
    ----------
    X : ndarray of shape (m, d)

    Returns
    -------
    xy : ndarray of shape (m, 2)
    how : str
    """
    from sklearn.decomposition import PCA

    if len(X) < 3 or X.shape[1] < 2:
        return np.zeros((len(X), 2)), "too few images"
    some = X[np.linspace(0, len(X) - 1, min(len(X), FITTED_ON)).astype(int)]
    pca = PCA(2, svd_solver="randomized", random_state=0).fit(some)
    xy = np.asarray(pca.transform(X), np.float64)
    reach = np.percentile(abs(xy), STANDS_OUT, axis=0)
    share = float(pca.explained_variance_ratio_.sum())
    told = f"principal components, which show {share:.0%} of the variance"
    return np.clip(xy / np.where(reach > 0, reach, 1), -1.08, 1.08), told
