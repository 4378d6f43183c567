"""Project embeddings to the plane."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_PCA_ROWS = 5000
CLIP_PERCENTILE = 99.5  # of the distances from the centre; points beyond it are drawn at the edge of the map


def project_to_plane(X: NDArray[np.float32]) -> tuple[NDArray[np.float64], float]:
    """Compute the first two principal components of embeddings, scaled to about -1 to 1.

    PCA is deterministic and takes a second, unlike t-SNE or UMAP. Points that are near in the plane need not be near in
    the embedding, which the report says.

    Parameters
    ----------
    X : ndarray of shape (m, d)

    Returns
    -------
    xy : ndarray of shape (m, 2)
        Zero if there are too few rows or dimensions.
    explained_variance : float
        Share of the variance, 0 to 1.
    """
    from sklearn.decomposition import PCA

    if len(X) < 3 or X.shape[1] < 2:
        return np.zeros((len(X), 2)), 0.0
    sample = X[np.linspace(0, len(X) - 1, min(len(X), MAX_PCA_ROWS)).astype(int)]
    pca = PCA(2, svd_solver="randomized", random_state=0).fit(sample)
    xy = np.asarray(pca.transform(X), np.float64)
    extent = np.percentile(abs(xy), CLIP_PERCENTILE, axis=0)
    explained_variance = float(pca.explained_variance_ratio_.sum())
    return np.clip(xy / np.where(extent > 0, extent, 1), -1.08, 1.08), explained_variance
