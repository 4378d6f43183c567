"""Embeddings in the plane."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["project_to_plane"]

MAX_PCA_ROWS = 5000  # rows
CLIP_PERCENTILE = 99.5  # percentile of the distance from the middle, at which the map ends


def project_to_plane(X: NDArray[np.float32]) -> tuple[NDArray[np.float64], str]:
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
    sample = X[np.linspace(0, len(X) - 1, min(len(X), MAX_PCA_ROWS)).astype(int)]
    pca = PCA(2, svd_solver="randomized", random_state=0).fit(sample)
    xy = np.asarray(pca.transform(X), np.float64)
    extent = np.percentile(abs(xy), CLIP_PERCENTILE, axis=0)
    explained_variance = float(pca.explained_variance_ratio_.sum())
    description = f"principal components, which show {explained_variance:.0%} of the variance"
    return np.clip(xy / np.where(extent > 0, extent, 1), -1.08, 1.08), description
