"""Uncertainty of predictions: out-of-distribution score and conformal prediction sets.

Both are calibrated on held-out images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.errors import ConfigError

Floats = NDArray[np.float64]

MAX_REFERENCES = 1000  # training embeddings; one of each class if there are more classes
N_NOVELTY_NEIGHBORS = 3
MAX_QUANTILES = 2000  # of held-out values; all values are kept if there are fewer
SIMILARITY_BLOCK_ROWS = 4096


@dataclass(frozen=True, eq=False)
class NoveltyScorer:
    """The distance of an image from the training images: 1 - the mean cosine to its nearest neighbours among them.

    Attributes
    ----------
    references : ndarray of shape (n, d), float16
        Some training embeddings, scaled to length one.
    distances : ndarray of shape (q,), float32
        Distances of training images from the others, ascending; each leaves out itself, its copies and its group.

    Notes
    -----
    Nearest neighbours of embeddings of length one are those of Sun et al., "Out-of-distribution detection with deep
    nearest neighbors", ICML 2022; a few hundred training images serve as well as all of them. They detected unseen
    classes and other collections at least as well as a Mahalanobis distance (mean area under the ROC curve .86 against
    .83 over eight pairs of real collections), and need no covariance estimated from few rows.
    """

    references: NDArray[np.float16]
    distances: NDArray[np.float32]

    @classmethod
    def from_embeddings(
        cls, X: NDArray[Any], reference_rows: NDArray[np.integer[Any]], group_keys: NDArray[Any]
    ) -> NoveltyScorer:
        """Make a scorer from training embeddings.

        Parameters
        ----------
        X : ndarray of shape (m, d)
        reference_rows : ndarray of shape (n,)
            The rows to store as references.
        group_keys : ndarray of shape (m,) or (m, c)
            Rows that agree in any column, such as copies or rows of one group, are not compared with each other.
        """
        references = _normalize_rows(X[reference_rows]).astype(np.float16)
        return cls(
            references, _to_quantiles(_held_out_distances(X, references[:0], references, reference_rows, group_keys))
        )

    def extend(
        self, X: NDArray[Any], reference_rows: NDArray[np.integer[Any]], group_keys: NDArray[Any], n_images: int
    ) -> NoveltyScorer:
        """Add training embeddings; old and new distances are weighted by the number of images that they represent.

        The distances of earlier images are not recomputed. Rows of other classes are rarely nearer than rows of the own
        class, so the exact distances would be slightly smaller at most, and novelty is not overestimated.

        Parameters
        ----------
        X, reference_rows, group_keys
            Of the additional embeddings, as in :meth:`from_embeddings`.
        n_images : int
            The number of images that the current distances represent.
        """
        new_references = _normalize_rows(X[reference_rows]).astype(np.float16)
        new_distances = np.sort(_held_out_distances(X, self.references, new_references, reference_rows, group_keys))
        total = n_images + len(new_distances)
        n_quantiles = min(MAX_QUANTILES, total)
        n_old = round(n_quantiles * (n_images / max(1, total)))
        quantiles = np.concatenate(
            [_resample_quantiles(self.distances, n_old), _resample_quantiles(new_distances, n_quantiles - n_old)]
        )
        references = np.concatenate([self.references, new_references])
        return NoveltyScorer(references, np.sort(quantiles).astype(np.float32))

    def __call__(self, X: NDArray[Any]) -> Floats:
        """Out-of-distribution scores, shape (m,): percentiles among held-out training images, from 0 to 1."""
        blocks = [_normalize_rows(X[i : i + SIMILARITY_BLOCK_ROWS]) for i in range(0, len(X), SIMILARITY_BLOCK_ROWS)]
        references = self.references.astype(np.float32).T
        distances = np.concatenate([np.zeros(0), *(_mean_neighbor_distance(block @ references) for block in blocks)])
        return np.asarray(np.searchsorted(self.distances, distances) / (len(self.distances) + 1))


def _normalize_rows(X: NDArray[Any]) -> NDArray[np.float32]:
    rows = np.asarray(X, np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)


def _mean_neighbor_distance(similarities: NDArray[np.float32]) -> Floats:
    k = min(N_NOVELTY_NEIGHBORS, similarities.shape[1])
    return np.asarray(1 - np.partition(similarities, -k, axis=1)[:, -k:].mean(axis=1), np.float64)


def _held_out_distances(
    X: NDArray[Any],
    earlier_references: NDArray[np.float16],
    new_references: NDArray[np.float16],
    reference_rows: NDArray[np.integer[Any]],
    group_keys: NDArray[Any],
) -> Floats:
    """Distances of embeddings from references outside their own group; rows without such a reference are dropped."""
    group_keys = np.reshape(group_keys, (len(X), -1))
    all_references = np.concatenate([earlier_references, new_references]).astype(np.float32)
    block_distances = []
    for start in range(0, len(X), SIMILARITY_BLOCK_ROWS):
        block = slice(start, start + SIMILARITY_BLOCK_ROWS)
        similarities = _normalize_rows(X[block]) @ all_references.T
        for column in group_keys.T:
            similarities[:, len(earlier_references) :][column[block, None] == column[reference_rows][None]] = -np.inf
        block_distances.append(_mean_neighbor_distance(similarities))
    distances = np.concatenate(block_distances)
    return distances[np.isfinite(distances)]


def _to_quantiles(values: NDArray[Any]) -> NDArray[np.float32]:
    """The values in ascending order, reduced to `MAX_QUANTILES` evenly spaced ranks if there are more."""
    ordered = np.sort(values, axis=0)
    return np.asarray(
        _resample_quantiles(ordered, MAX_QUANTILES) if len(ordered) > MAX_QUANTILES else ordered, np.float32
    )


def _resample_quantiles(ordered: NDArray[Any], n: int) -> NDArray[Any]:
    """Take n of some sorted values at evenly spaced ranks; values repeat if there are fewer than n."""
    if not len(ordered):
        return ordered
    return np.asarray(ordered[np.ceil(np.arange(1, n + 1) * len(ordered) / n).astype(int) - 1])


@dataclass(frozen=True, eq=False)
class ConformalPredictor:
    """Conformal prediction sets of classes, or intervals for regression, with a requested coverage.

    Attributes
    ----------
    scores : ndarray of shape (q,) or (q, t), float32
        Nonconformity scores of held-out images, ascending: 1 - the probability of their class; for regression the
        absolute error of each target.

    Notes
    -----
    The score is that of Sadinle, Lei and Wasserman, "Least ambiguous set-valued classifiers with bounded error levels",
    JASA 2019, which gives the smallest sets. The most probable class always belongs to a set, which only increases the
    coverage. The scores come from the folds of cross-validation, whose heads saw fewer images than the model. Coverage
    is marginal: on average over new images like the training images, not for each class.
    """

    scores: NDArray[np.float32]

    @classmethod
    def from_predictions(cls, predictions: Floats, y: NDArray[Any]) -> ConformalPredictor:
        """Calibrate on predictions for held-out rows.

        Parameters
        ----------
        predictions : ndarray of shape (m, k), or (m,) or (m, t)
            Probabilities, or predicted numbers.
        y : ndarray of shape (m,), or as ``predictions``
            Class codes, or targets.
        """
        if y.dtype.kind in "iu":
            return cls(_to_quantiles(1 - predictions[np.arange(len(y)), y]))
        errors = abs(np.reshape(predictions, (len(y), -1)) - np.reshape(y, (len(y), -1)))
        return cls(_to_quantiles(errors))

    def score_quantile(self, level: float) -> NDArray[Any]:
        """The conformal quantile of the scores at a level; infinite if there are too few held-out images."""
        if not 0 < level < 1:
            raise ConfigError(f"sets is {level}, expected a coverage between 0 and 1, such as 0.9")
        n = len(self.scores)
        rank = math.ceil((n + 1) * level)
        return np.full(self.scores.shape[1:], np.inf) if rank > n else self.scores[rank - 1]

    def predict_sets(self, probabilities: Floats, level: float) -> NDArray[np.bool_]:
        """A mask of the classes in the set of each row, shape (m, k)."""
        included = np.asarray(1 - probabilities <= self.score_quantile(level) + 1e-6)
        included[np.arange(len(included)), probabilities.argmax(axis=1)] = True
        return included

    def predict_intervals(self, values: Floats, level: float) -> Floats:
        """The ends of the interval of each number, shape (m, t, 2)."""
        columns = np.reshape(values, (len(values), -1))
        half_widths = np.reshape(self.score_quantile(level), -1)
        return np.stack([columns - half_widths, columns + half_widths], axis=-1)


@dataclass(frozen=True, eq=False)
class Uncertainty:
    """Out-of-distribution score and prediction sets of a model, calibrated on held-out images.

    Attributes
    ----------
    novelty : NoveltyScorer or None
    conformal : ConformalPredictor or None
        None without cross-validation.
    """

    novelty: NoveltyScorer | None = None
    conformal: ConformalPredictor | None = None


def dumps(uncertainty: Uncertainty) -> bytes:
    """Serialize to safetensors."""
    from safetensors.numpy import save

    arrays: dict[str, NDArray[Any]] = {}
    if uncertainty.novelty is not None:
        arrays |= {"novelty.rows": uncertainty.novelty.references, "novelty.distances": uncertainty.novelty.distances}
    if uncertainty.conformal is not None:
        arrays["conformal.scores"] = uncertainty.conformal.scores
    return bytes(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


def loads(data: bytes) -> Uncertainty:
    """Load what `dumps` wrote.

    Raises
    ------
    ValueError
        If an array has an unexpected name, type, shape or value.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays: Mapping[str, NDArray[Any]] = load(data)
    except SafetensorError as error:
        raise ValueError(f"not safetensors: {error}") from None
    expected = {"novelty.rows": (2, "f2"), "novelty.distances": (1, "f4"), "conformal.scores": (0, "f4")}
    for name, array in arrays.items():
        ndim, dtype = expected.get(name, (-1, ""))
        is_valid = array.dtype == dtype and array.ndim == (ndim or min(array.ndim, 2)) and array.ndim > 0
        if not is_valid or not len(array) or not np.isfinite(array).all():
            raise ValueError(
                f"array {name[:40]!r} is {array.dtype} of shape {array.shape}; "
                f"expected finite values in the type and number of axes of {', '.join(expected)}"
            )
    references, distances = arrays.get("novelty.rows"), arrays.get("novelty.distances")
    scores = arrays.get("conformal.scores")
    return Uncertainty(
        None if references is None or distances is None else NoveltyScorer(references, np.sort(distances)),
        None if scores is None else ConformalPredictor(np.sort(scores, axis=0)),
    )
