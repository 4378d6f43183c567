"""Sums over rows, class by class: all that a closed-form head needs to learn more rows and more classes exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from featpipe.heads.closed import (
    centroid_from,
    lda_from,
    ridge_classifier_from,
    scaled_by,
    shrunk,
    shrunk_apart,
    standardised,
)
from featpipe.heads.moments import Moments, RowSource, moments
from featpipe.heads.table import build

__all__ = ["Kind", "Statistics", "fit_from_statistics", "gather", "in_place_of", "kind_for", "takes"]

Array = NDArray[np.float64]
Kind = Literal["diagonal", "gram", "apart"]

DRAWN_SHRINKAGE = 0.1  # of a covariance that was not shrunk before rows are drawn from it


@dataclass(frozen=True, eq=False)
class Statistics:
    """Sums over the rows of k classes, of width d, with x taken from ``shift``.

    Attributes
    ----------
    kind : {"diagonal", "gram", "apart"}
        What ``square`` is.
    counts : ndarray of shape (k,)
        Rows of each class.
    sums : ndarray of shape (k, d)
        Σ (x - shift) of each class.
    squares : ndarray of shape (d,)
        Σ (x - shift)²
    shift : ndarray of shape (d,)
    square : ndarray of shape (d, d) or (0, 0)
        "gram": Σ (x - shift)(x - shift)ᵀ. "apart": Σ n_c S_c, where S_c is the covariance of class c, shrunk by its own
        rows, as `shrunk_apart` does. "diagonal": empty, ``squares`` are enough.
    flat : ndarray of shape (d,)
        Of "apart": Σ n_c flat_c.
    """

    kind: Kind
    counts: Array
    sums: Array
    squares: Array
    shift: Array
    square: Array
    flat: Array

    @property
    def rows(self) -> int:
        return int(self.counts.sum())

    @property
    def means(self) -> Array:
        """Of each class, shape (k, d)."""
        return self.shift + self.sums / np.maximum(self.counts, 1)[:, None]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays().values())

    def moments(self) -> Moments:
        """The same as the heads take them."""
        x = self.sums.sum(axis=0)
        gram = self.square if self.kind == "gram" else self.squares
        return Moments(
            self.rows, float(self.rows), x, gram, self.counts, self.sums.T, self.shift, x.copy(), self.squares
        )

    def __add__(self, other: Statistics) -> Statistics:
        if self.kind != other.kind or not np.array_equal(self.shift, other.shift):
            raise ValueError("statistics of different kinds or shifts cannot be added")
        between = np.zeros_like(self.square)
        if self.kind == "apart":  # a class in both: what lies between the means of its two parts
            both = np.flatnonzero((self.counts > 0) & (other.counts > 0))
            apart = (self.means - other.means)[both]
            share = (self.counts * other.counts)[both] / (self.counts + other.counts)[both]
            between = (apart.T * share) @ apart
        return replace(
            self,
            counts=self.counts + other.counts,
            sums=self.sums + other.sums,
            squares=self.squares + other.squares,
            square=self.square + other.square + between,
            flat=self.flat + other.flat,
        )

    def regrouped(self, place: NDArray[np.intp], k: int) -> Statistics:
        """As of other classes.

        Parameters
        ----------
        place : ndarray of shape (k_before,)
            The class that each becomes; several may become one; -1 leaves a class out, with the share of the scatter
            within classes that its rows have.
        k : int
            How many classes there are then.
        """
        kept = place >= 0
        became = self._without(np.flatnonzero(~kept))
        counts, sums = np.zeros(k), np.zeros((k, len(self.shift)))
        np.add.at(counts, place[kept], self.counts[kept])
        np.add.at(sums, place[kept], self.sums[kept])
        if self.kind == "apart":
            before = (became.sums.T / np.maximum(became.counts, 1)) @ became.sums
            after = (sums.T / np.maximum(counts, 1)) @ sums
            became = replace(became, square=became.square + before - after)
        return replace(became, counts=counts, sums=sums)

    def _without(self, gone: NDArray[np.intp]) -> Statistics:
        if not len(gone):
            return self
        counts, sums = self.counts.copy(), self.sums.copy()
        share = counts[gone].sum() / self.rows
        about = sums[gone].T / np.maximum(counts[gone], 1)  # each class's rows around the shift, by its mean
        within = self.squares - (sums**2 / np.maximum(counts, 1)[:, None]).sum(axis=0)
        squares = self.squares - np.einsum("dc,cd->d", about, sums[gone]) - share * within
        square, flat = self.square, self.flat
        if self.kind == "apart":
            square, flat = (1 - share) * square, (1 - share) * flat
        elif self.kind == "gram":
            scatter = square - (sums.T / np.maximum(counts, 1)) @ sums
            square = square - about @ sums[gone] - share * scatter
        counts[gone], sums[gone] = 0, 0
        return replace(self, counts=counts, sums=sums, squares=squares, square=square, flat=flat)

    def draw(self, each: int, seed: int = 0) -> tuple[Array, NDArray[np.int64]]:
        """Made-up rows: normally distributed about the means of the classes, with the scatter within classes.

        Parameters
        ----------
        each : int
            Rows for each class that has any.
        seed : int

        Returns
        -------
        X : ndarray of shape (r, d), codes : ndarray of shape (r,)
        """
        from scipy.linalg import cholesky

        codes = np.repeat(np.flatnonzero(self.counts > 0), each)
        noise = np.random.default_rng(seed).normal(size=(len(codes), len(self.shift)))
        around = (self.sums.T / np.maximum(self.counts, 1)) @ self.sums if self.kind == "gram" else 0.0
        within = np.maximum(self.squares - (self.sums**2 / np.maximum(self.counts, 1)[:, None]).sum(axis=0), 0)
        if self.kind == "diagonal":
            return self.means[codes] + noise * np.sqrt(within / self.rows), codes
        covariance = (self.square - around) / self.rows
        if self.kind == "gram":
            covariance = shrunk(covariance, DRAWN_SHRINKAGE)
        covariance.flat[:: len(covariance) + 1] += 1e-6 * max(np.trace(covariance) / len(covariance), 1e-300)
        return self.means[codes] + noise @ cholesky(covariance), codes

    def arrays(self) -> dict[str, NDArray[Any]]:
        """As they are stored: of a symmetric matrix the lower triangle."""
        triangle = self.square[np.tril_indices(len(self.square))]
        found = {"counts": self.counts, "sums": self.sums, "squares": self.squares, "shift": self.shift}
        if self.kind != "diagonal":
            found[self.kind] = triangle
        if self.kind == "apart":
            found["flat"] = self.flat
        return found

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[Any]]) -> Statistics:
        """From `arrays`.

        Raises
        ------
        ValueError
            If they do not fit together.
        """
        kind: Kind = "gram" if "gram" in arrays else "apart" if "apart" in arrays else "diagonal"
        found = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
        if not all(np.isfinite(array).all() for array in found.values()):
            raise ValueError("statistics hold NaN or infinity")
        k, d = found["sums"].shape
        size = 0 if kind == "diagonal" else d
        triangle, flat = found.get(kind, np.zeros(0)), found.get("flat", np.zeros(d))
        fits = {"counts": (k,), "squares": (d,), "shift": (d,)}
        if any(found[name].shape != shape for name, shape in fits.items()) or flat.shape != (d,):
            raise ValueError("statistics are of different shapes")
        if triangle.shape != (size * (size + 1) // 2,) or (found["counts"] < 0).any():
            raise ValueError("statistics are of different shapes, or count less than nothing")
        square = np.zeros((size, size))
        square[np.tril_indices(size)] = triangle
        square += np.tril(square, -1).T
        return cls(kind, found["counts"], found["sums"], found["squares"], found["shift"], square, flat)


def kind_for(pipeline: Any) -> tuple[Kind, bool]:
    """What a head is made of, and whether it follows from that exactly.

    Of a head without a closed form, or with settings for which there is none, it is what `in_place_of` takes.
    """
    scaler, head = pipeline[0], pipeline[-1]
    plain = scaler == "passthrough" or type(scaler) is StandardScaler
    if isinstance(head, RidgeClassifier) and head.class_weight is None and not head.positive and plain:
        return "gram", True
    if type(head) is LinearDiscriminantAnalysis and head.solver == "lsqr" and head.priors is None and plain:
        exact = head.covariance_estimator is None
        return ("gram" if exact and head.shrinkage != "auto" else "apart"), exact
    if type(head) is NearestCentroid and head.metric == "euclidean" and isinstance(head.priors, str) and plain:
        return "diagonal", True
    return "gram", False


def takes(pipeline: Any, kind: Kind) -> bool:
    """Whether a head, or what stands in its place, is made of statistics of a kind."""
    own, exact = kind_for(pipeline)
    return kind == own or (not exact and kind in ("gram", "apart"))


def in_place_of(pipeline: Pipeline, kind: Kind) -> Pipeline:
    """An unfitted head that follows exactly from statistics of a kind: the same where it does.

    For a head without a closed form a ridge whose strength has most evidence. Of the closed-form heads it is nearest to
    a logistic head on real images (tests/benchmarks); its sums are exact for more images of old classes too; and in it
    classes of one image count as much as others. An LDA, of models that keep the sums of one.
    """
    if kind_for(pipeline)[1]:
        return pipeline
    return build("lda") if kind == "apart" else build("ridge", params={"alpha": "auto"})


def gather(kind: Kind, X: RowSource, codes: NDArray[Any], k: int, shift: Array | None = None) -> Statistics:
    """The statistics of some rows.

    Parameters
    ----------
    kind : {"diagonal", "gram", "apart"}
    X : RowSource of shape (n, d)
    codes : ndarray of shape (n,), int
        The class of each row, below k; of a class there may be no row.
    k : int
    shift : ndarray of shape (d,), optional
        That of the statistics to which these are to be added.
    """
    d = X.shape[1]
    found = moments(X, codes, outer=kind == "gram", k=k, shift=shift)
    square, flat = np.zeros((0, 0)), np.zeros(d)
    if kind == "gram":
        square = found.gram
    elif kind == "apart":
        square = np.zeros((d, d))
        for code in np.unique(codes).tolist():
            rows = np.flatnonzero(codes == code)
            covariance, unscaled = shrunk_apart(np.asarray(X[rows], np.float64))  # type: ignore[index]
            square += len(rows) * covariance
            flat += len(rows) * unscaled
    shift = np.asarray(found.shift, np.float64)
    return Statistics(kind, found.y, found.cross.T, found.squares, shift, square, flat)


def fit_from_statistics(pipeline: Pipeline, statistics: Statistics) -> Pipeline:
    """Fit a scaler and a closed-form head, in place, as to the rows themselves, of classes 0 to k - 1.

    Raises
    ------
    ValueError
        If a class has no rows, or the statistics are not of the kind that the head takes.
    """
    scaler, head = pipeline[0], pipeline[-1]
    if (kind := kind_for(pipeline)[0]) != statistics.kind:
        raise ValueError(f"{type(head).__name__} takes statistics of kind {kind}, not {statistics.kind}")
    if not statistics.counts.all():
        raise ValueError(f"class {int(statistics.counts.argmin())} has no rows")
    classes = np.arange(len(statistics.counts))
    found = standardised(scaler, statistics.moments())
    if isinstance(head, RidgeClassifier):
        ridge_classifier_from(head, found, classes)
    elif type(head) is NearestCentroid:
        centroid_from(head, found, classes)
    elif statistics.kind == "gram":
        lda_from(head, found, classes)
    else:
        scale = scaled_by(scaler, len(statistics.shift))[1]
        covariance = statistics.square / scale / scale[:, None] + np.diag(statistics.flat)
        lda_from(head, found, classes, covariance / statistics.rows)
    head.n_features_in_ = len(statistics.shift)
    return pipeline
