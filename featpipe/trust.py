"""How far a prediction can be trusted: how new an image looks, and sets of answers that hold the right one.

Both are calibrated on images that were held out, so that they read as shares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.errors import ConfigError

__all__ = ["Conformal", "Novelty", "Trust", "dumps", "loads"]

Floats = NDArray[np.float64]

KEPT = 1000  # training embeddings; where there are more classes, one of each
NEAREST = 3
QUANTILES = 2000  # of held-out figures; all of them where there are fewer
ROWS_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class Novelty:
    """How far an image is from those of training: 1 - the mean cosine to the nearest few of them.

    Attributes
    ----------
    rows : ndarray of shape (n, d), float16
        Directions of some training embeddings.
    distances : ndarray of shape (q,), float32
        Of training images from the others, ascending: each without itself, its copies and its group.

    Notes
    -----
    Nearest neighbours of embeddings of length one are those of Sun et al., "Out-of-distribution detection with deep
    nearest neighbors", ICML 2022; a few hundred training images serve as well as all of them. They told unseen classes
    and other collections from training as well as a Mahalanobis distance does or better (mean area under the ROC curve
    .86 against .83 over eight pairs of real collections), and need no covariance of few rows.
    """

    rows: NDArray[np.float16]
    distances: NDArray[np.float32]

    @classmethod
    def of(cls, X: NDArray[Any], kept: NDArray[np.integer[Any]], alike: NDArray[Any]) -> Novelty:
        """From training embeddings.

        Parameters
        ----------
        X : ndarray of shape (m, d)
        kept : ndarray of shape (n,)
            The rows that are kept.
        alike : ndarray of shape (m,) or (m, c)
            Rows that agree in any column are not held out from each other: copies, or of one group.
        """
        rows = _directions(X[kept]).astype(np.float16)
        return cls(rows, _quantiles(_distances_apart(X, rows[:0], rows, kept, alike)))

    def joined(self, X: NDArray[Any], kept: NDArray[np.integer[Any]], alike: NDArray[Any], images: int) -> Novelty:
        """With more training embeddings, each distance as frequent as the images that it stands for.

        The distances of earlier images stay what they were. Rows of other classes are seldom nearer than their own, so
        that they become a little smaller at most, and an image of theirs looks no newer than it should.

        Parameters
        ----------
        X, kept, alike
            Of the embeddings that come, as `of` takes them.
        images : int
            How many the distances so far stand for.
        """
        rows = _directions(X[kept]).astype(np.float16)
        found = np.sort(_distances_apart(X, self.rows, rows, kept, alike))
        q, share = min(QUANTILES, images + len(found)), images / max(1, images + len(found))
        before, after = _spread(self.distances, round(q * share)), _spread(found, q - round(q * share))
        return Novelty(np.concatenate([self.rows, rows]), np.sort(np.concatenate([before, after])).astype(np.float32))

    def __call__(self, X: NDArray[Any]) -> Floats:
        """For each embedding the share of training-like images that look less new, shape (m,): 0 to 1."""
        blocks = [_directions(X[i : i + ROWS_AT_ONCE]) for i in range(0, len(X), ROWS_AT_ONCE)]
        rows = self.rows.astype(np.float32).T
        found = np.concatenate([_distance(block @ rows) for block in blocks]) if blocks else np.zeros(0)
        return np.asarray(np.searchsorted(self.distances, found) / (len(self.distances) + 1))


def _directions(X: NDArray[Any]) -> NDArray[np.float32]:
    rows = np.asarray(X, np.float32)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)


def _distance(similar: NDArray[np.float32]) -> Floats:
    k = min(NEAREST, similar.shape[1])
    return np.asarray(1 - np.partition(similar, -k, axis=1)[:, -k:].mean(axis=1), np.float64)


def _distances_apart(
    X: NDArray[Any],
    others: NDArray[np.float16],
    rows: NDArray[np.float16],
    kept: NDArray[np.integer[Any]],
    alike: NDArray[Any],
) -> Floats:
    """Of embeddings from directions, of which some are their own and left out; those that are left with any."""
    alike = np.reshape(alike, (len(X), -1))
    every, n = np.concatenate([others, rows]).astype(np.float32), len(others)
    found = []
    for start in range(0, len(X), ROWS_AT_ONCE):
        block = slice(start, start + ROWS_AT_ONCE)
        similar = _directions(X[block]) @ every.T
        for column in alike.T:
            similar[:, n:][column[block, None] == column[kept][None]] = -np.inf
        found.append(_distance(similar))
    distances = np.concatenate(found)
    return distances[np.isfinite(distances)]


def _quantiles(values: NDArray[Any]) -> NDArray[np.float32]:
    """The values, ascending; of very many so many that stand at even distances in their order."""
    ordered = np.sort(values, axis=0)
    return np.asarray(_spread(ordered, QUANTILES) if len(ordered) > QUANTILES else ordered, np.float32)


def _spread(ordered: NDArray[Any], n: int) -> NDArray[Any]:
    """So many of some values in their order, at even distances; each several times where there are fewer."""
    if not len(ordered):
        return ordered
    return np.asarray(ordered[np.ceil(np.arange(1, n + 1) * len(ordered) / n).astype(int) - 1])


@dataclass(frozen=True, eq=False)
class Conformal:
    """Sets of classes, or intervals of numbers, that hold the right one as often as is asked for.

    Attributes
    ----------
    scores : ndarray of shape (q,) or (q, t), float32
        What was said of held-out images, ascending: 1 - the probability of their class; of a regression the absolute
        error of each target.

    Notes
    -----
    The score is that of Sadinle, Lei and Wasserman, "Least ambiguous set-valued classifiers with bounded error levels",
    JASA 2019, which makes the smallest sets; the most probable class always belongs to a set, which only adds to its
    coverage. The scores are of the folds of cross-validation, whose heads saw fewer images than the model did: coverage
    is that of new images like those of training, on average over all of them, not for each class.
    """

    scores: NDArray[np.float32]

    @classmethod
    def of(cls, answers: Floats, y: NDArray[Any]) -> Conformal:
        """From predictions of rows that were held out.

        Parameters
        ----------
        answers : ndarray of shape (m, k), or (m,) or (m, t)
            Probabilities, or numbers.
        y : ndarray of shape (m,), or as ``answers``
            Class codes, or targets.
        """
        if y.dtype.kind in "iu":
            return cls(_quantiles(1 - answers[np.arange(len(y)), y]))
        errors = abs(np.reshape(answers, (len(y), -1)) - np.reshape(y, (len(y), -1)))
        return cls(_quantiles(errors))

    def reach(self, level: float) -> NDArray[Any]:
        """The score that held-out images do not exceed at a level; infinite where they are too few to say."""
        if not 0 < level < 1:
            raise ConfigError(
                f"a level of {level}; sets hold the right answer with a share between 0 and 1, such as 0.9"
            )
        n = len(self.scores)
        rank = math.ceil((n + 1) * level)
        return np.full(self.scores.shape[1:], np.inf) if rank > n else self.scores[rank - 1]

    def sets(self, probabilities: Floats, level: float) -> NDArray[np.bool_]:
        """Which classes belong to the set of each row, shape (m, k)."""
        found = np.asarray(1 - probabilities <= self.reach(level) + 1e-6)
        found[np.arange(len(found)), probabilities.argmax(axis=1)] = True
        return found

    def intervals(self, values: Floats, level: float) -> Floats:
        """The ends of the interval of each number, shape (m, t, 2)."""
        columns = np.reshape(values, (len(values), -1))
        reach = np.reshape(self.reach(level), -1)
        return np.stack([columns - reach, columns + reach], axis=-1)


@dataclass(frozen=True, eq=False)
class Trust:
    """What a model knows of held-out images.

    Attributes
    ----------
    novelty : Novelty or None
    conformal : Conformal or None
        None where there was no cross-validation.
    """

    novelty: Novelty | None = None
    conformal: Conformal | None = None


def dumps(trust: Trust) -> bytes:
    """As safetensors."""
    from safetensors.numpy import save

    arrays: dict[str, NDArray[Any]] = {}
    if trust.novelty is not None:
        arrays |= {"novelty.rows": trust.novelty.rows, "novelty.distances": trust.novelty.distances}
    if trust.conformal is not None:
        arrays["conformal.scores"] = trust.conformal.scores
    return bytes(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


def loads(data: bytes) -> Trust:
    """From `dumps`.

    Raises
    ------
    ValueError
        If the arrays are not what they should be.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays: Mapping[str, NDArray[Any]] = load(data)
    except SafetensorError as error:
        raise ValueError(f"not safetensors: {error}") from None
    known = {"novelty.rows": (2, "f2"), "novelty.distances": (1, "f4"), "conformal.scores": (0, "f4")}
    for name, array in arrays.items():
        ndim, kind = known.get(name, (-1, ""))
        fits = array.dtype == kind and array.ndim == (ndim or min(array.ndim, 2)) and array.ndim > 0
        if not fits or not len(array) or not np.isfinite(array).all():
            raise ValueError(f"{name[:40]!r} is {array.dtype} of shape {array.shape}, which no model holds")
    rows, distances = arrays.get("novelty.rows"), arrays.get("novelty.distances")
    scores = arrays.get("conformal.scores")
    return Trust(
        None if rows is None or distances is None else Novelty(rows, np.sort(distances)),
        None if scores is None else Conformal(np.sort(scores, axis=0)),
    )
