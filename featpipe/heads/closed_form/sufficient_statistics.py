"""Sums over rows by class, from which closed-form heads learn further rows and classes exactly."""

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

from featpipe.heads.closed_form.moments import Moments, RowSource, compute_moments
from featpipe.heads.closed_form.solve import (
    compute_ledoit_wolf_covariance,
    fit_centroid_from_moments,
    fit_lda_from_moments,
    fit_ridge_classifier_from_moments,
    get_center_and_scale,
    shrink_covariance,
    standardize_moments,
)
from featpipe.heads.registry import build

Array = NDArray[np.float64]
StatisticsKind = Literal["diagonal", "gram", "apart"]

SAMPLING_SHRINKAGE = 0.1  # of an unshrunk covariance before rows are sampled from it


@dataclass(frozen=True, eq=False)
class SufficientStatistics:
    """Sums over the rows of k classes, of width d, with x measured from ``shift``.

    Attributes
    ----------
    kind : {"diagonal", "gram", "apart"}
        The content of ``scatter_matrix``.
    counts : ndarray of shape (k,)
        Number of rows of each class.
    sums : ndarray of shape (k, d)
        Σ (x - shift) of each class.
    squares : ndarray of shape (d,)
        Σ (x - shift)²
    shift : ndarray of shape (d,)
    scatter_matrix : ndarray of shape (d, d) or (0, 0)
        "gram": Σ (x - shift)(x - shift)ᵀ. "apart": Σ n_c S_c, where S_c is the covariance of class c, shrunk by
        `compute_ledoit_wolf_covariance`. "diagonal": empty, because ``squares`` suffices.
    constant_variances : ndarray of shape (d,)
        "apart": Σ n_c v_c, where v_c are the ``constant_variances`` of class c.
    """

    kind: StatisticsKind
    counts: Array
    sums: Array
    squares: Array
    shift: Array
    scatter_matrix: Array
    constant_variances: Array

    @property
    def n_rows(self) -> int:
        return int(self.counts.sum())

    @property
    def means(self) -> Array:
        """The mean of each class, shape (k, d)."""
        return self.shift + self.sums / np.maximum(self.counts, 1)[:, None]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.to_arrays().values())

    def to_moments(self) -> Moments:
        """Convert to the moments from which heads are solved."""
        x = self.sums.sum(axis=0)
        gram = self.scatter_matrix if self.kind == "gram" else self.squares
        return Moments(
            self.n_rows, float(self.n_rows), x, gram, self.counts, self.sums.T, self.shift, x.copy(), self.squares
        )

    def __add__(self, other: SufficientStatistics) -> SufficientStatistics:
        if self.kind != other.kind or not np.array_equal(self.shift, other.shift):
            raise ValueError("statistics of different kinds or shifts cannot be added; compute both with the same")
        between = np.zeros_like(self.scatter_matrix)
        if self.kind == "apart":  # scatter between the two means of a class that both contain
            shared = np.flatnonzero((self.counts > 0) & (other.counts > 0))
            mean_differences = (self.means - other.means)[shared]
            weights = (self.counts * other.counts)[shared] / (self.counts + other.counts)[shared]
            between = (mean_differences.T * weights) @ mean_differences
        return replace(
            self,
            counts=self.counts + other.counts,
            sums=self.sums + other.sums,
            squares=self.squares + other.squares,
            scatter_matrix=self.scatter_matrix + other.scatter_matrix + between,
            constant_variances=self.constant_variances + other.constant_variances,
        )

    def remap_classes(self, new_codes: NDArray[np.intp], k: int) -> SufficientStatistics:
        """Rename, merge and remove classes.

        Parameters
        ----------
        new_codes : ndarray of shape (k_before,)
            The new code of each class. Classes with the same code are merged; -1 removes a class, together with its
            rows' share of the scatter within classes.
        k : int
            The number of classes afterwards.
        """
        is_kept = new_codes >= 0
        remaining = self._remove_classes(np.flatnonzero(~is_kept))
        counts, sums = np.zeros(k), np.zeros((k, len(self.shift)))
        np.add.at(counts, new_codes[is_kept], self.counts[is_kept])
        np.add.at(sums, new_codes[is_kept], self.sums[is_kept])
        if self.kind == "apart":
            between_before = (remaining.sums.T / np.maximum(remaining.counts, 1)) @ remaining.sums
            between_after = (sums.T / np.maximum(counts, 1)) @ sums
            remaining = replace(remaining, scatter_matrix=remaining.scatter_matrix + between_before - between_after)
        return replace(remaining, counts=counts, sums=sums)

    def _remove_classes(self, removed: NDArray[np.intp]) -> SufficientStatistics:
        if not len(removed):
            return self
        counts, sums = self.counts.copy(), self.sums.copy()
        removed_fraction = counts[removed].sum() / self.n_rows
        removed_means = sums[removed].T / np.maximum(counts[removed], 1)  # from the shift
        within = self.squares - (sums**2 / np.maximum(counts, 1)[:, None]).sum(axis=0)
        squares = self.squares - np.einsum("dc,cd->d", removed_means, sums[removed]) - removed_fraction * within
        scatter_matrix, constant_variances = self.scatter_matrix, self.constant_variances
        if self.kind == "apart":
            scatter_matrix = (1 - removed_fraction) * scatter_matrix
            constant_variances = (1 - removed_fraction) * constant_variances
        elif self.kind == "gram":
            within_scatter = scatter_matrix - (sums.T / np.maximum(counts, 1)) @ sums
            scatter_matrix = scatter_matrix - removed_means @ sums[removed] - removed_fraction * within_scatter
        counts[removed], sums[removed] = 0, 0
        return replace(
            self,
            counts=counts,
            sums=sums,
            squares=squares,
            scatter_matrix=scatter_matrix,
            constant_variances=constant_variances,
        )

    def sample_rows(self, n_per_class: int, seed: int = 0) -> tuple[Array, NDArray[np.int64]]:
        """Sample synthetic rows from a normal distribution about each class mean, with the scatter within classes.

        Parameters
        ----------
        n_per_class : int
            Rows for each class that has rows.
        seed : int

        Returns
        -------
        X : ndarray of shape (r, d), codes : ndarray of shape (r,)
        """
        from scipy.linalg import cholesky

        codes = np.repeat(np.flatnonzero(self.counts > 0), n_per_class)
        noise = np.random.default_rng(seed).normal(size=(len(codes), len(self.shift)))
        between = (self.sums.T / np.maximum(self.counts, 1)) @ self.sums if self.kind == "gram" else 0.0
        within = np.maximum(self.squares - (self.sums**2 / np.maximum(self.counts, 1)[:, None]).sum(axis=0), 0)
        if self.kind == "diagonal":
            return self.means[codes] + noise * np.sqrt(within / self.n_rows), codes
        covariance = (self.scatter_matrix - between) / self.n_rows
        if self.kind == "gram":
            covariance = shrink_covariance(covariance, SAMPLING_SHRINKAGE)
        covariance.flat[:: len(covariance) + 1] += 1e-6 * max(np.trace(covariance) / len(covariance), 1e-300)
        return self.means[codes] + noise @ cholesky(covariance), codes

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays to store; of the symmetric matrix only the lower triangle."""
        triangle = self.scatter_matrix[np.tril_indices(len(self.scatter_matrix))]
        arrays = {"counts": self.counts, "sums": self.sums, "squares": self.squares, "shift": self.shift}
        if self.kind != "diagonal":
            arrays[self.kind] = triangle
        if self.kind == "apart":
            arrays["flat"] = self.constant_variances
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> SufficientStatistics:
        """Restore what `to_arrays` returned.

        Raises
        ------
        ValueError
            If values are not finite or shapes do not match.
        """
        kind: StatisticsKind = "gram" if "gram" in arrays else "apart" if "apart" in arrays else "diagonal"
        sums_by_name = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
        if not all(np.isfinite(array).all() for array in sums_by_name.values()):
            raise ValueError("statistics contain NaN or infinity")
        k, d = sums_by_name["sums"].shape
        size = 0 if kind == "diagonal" else d
        triangle, constant_variances = sums_by_name.get(kind, np.zeros(0)), sums_by_name.get("flat", np.zeros(d))
        expected_shapes = {"counts": (k,), "squares": (d,), "shift": (d,)}
        if any(
            sums_by_name[name].shape != shape for name, shape in expected_shapes.items()
        ) or constant_variances.shape != (d,):
            raise ValueError("statistics have different shapes")
        if triangle.shape != (size * (size + 1) // 2,) or (sums_by_name["counts"] < 0).any():
            raise ValueError("statistics have different shapes, or a count is negative")
        scatter_matrix = np.zeros((size, size))
        scatter_matrix[np.tril_indices(size)] = triangle
        scatter_matrix += np.tril(scatter_matrix, -1).T
        counts, sums, squares, shift = (sums_by_name[name] for name in ("counts", "sums", "squares", "shift"))
        return cls(kind, counts, sums, squares, shift, scatter_matrix, constant_variances)


def find_statistics_kind(pipeline: Any) -> tuple[StatisticsKind, bool]:
    """The kind of statistics that determines a head, and whether it does so exactly.

    For a head without a closed form, or with settings without one, the kind is that of `make_closed_form_head`.
    """
    scaler, head = pipeline[0], pipeline[-1]
    is_standard_scaling = scaler == "passthrough" or type(scaler) is StandardScaler
    if isinstance(head, RidgeClassifier) and head.class_weight is None and not head.positive and is_standard_scaling:
        return "gram", True
    if (
        type(head) is LinearDiscriminantAnalysis
        and head.solver == "lsqr"
        and head.priors is None
        and is_standard_scaling
    ):
        exact = head.covariance_estimator is None
        return ("gram" if exact and head.shrinkage != "auto" else "apart"), exact
    if (
        type(head) is NearestCentroid
        and head.metric == "euclidean"
        and isinstance(head.priors, str)
        and is_standard_scaling
    ):
        return "diagonal", True
    return "gram", False


def accepts_statistics(pipeline: Any, kind: StatisticsKind) -> bool:
    """Whether a head, or its substitute from `make_closed_form_head`, can be fitted from statistics of a kind."""
    own_kind, exact = find_statistics_kind(pipeline)
    return kind == own_kind or (not exact and kind in ("gram", "apart"))


def make_closed_form_head(pipeline: Pipeline, kind: StatisticsKind) -> Pipeline:
    """An unfitted head that statistics of a kind determine exactly: the given head if possible, else a substitute.

    The substitute of a head without a closed form is a ridge classifier with its penalty chosen by evidence: of the
    closed-form heads it is closest to a logistic head on real images (tests/benchmarks), its sums can take more images
    of old classes exactly, and classes with a single image count as much as others. For statistics of kind "apart" it
    is an LDA.
    """
    if find_statistics_kind(pipeline)[1]:
        return pipeline
    return build("lda") if kind == "apart" else build("ridge", params={"alpha": "auto"})


def compute_statistics(
    kind: StatisticsKind, X: RowSource, codes: NDArray[Any], k: int, shift: Array | None = None
) -> SufficientStatistics:
    """Compute the statistics of rows.

    Parameters
    ----------
    kind : {"diagonal", "gram", "apart"}
    X : RowSource of shape (n, d)
    codes : ndarray of shape (n,), int
        The class of each row, below k; classes may be empty.
    k : int
    shift : ndarray of shape (d,), optional
        The shift of statistics that these will be added to.
    """
    d = X.shape[1]
    row_moments = compute_moments(X, codes, full_gram=kind == "gram", n_classes=k, shift=shift)
    scatter_matrix, constant_variances = np.zeros((0, 0)), np.zeros(d)
    if kind == "gram":
        scatter_matrix = row_moments.gram
    elif kind == "apart":
        scatter_matrix = np.zeros((d, d))
        for code in np.unique(codes).tolist():
            rows = np.flatnonzero(codes == code)
            covariance, class_constant_variances = compute_ledoit_wolf_covariance(np.asarray(X[rows], np.float64))  # type: ignore[index]
            scatter_matrix += len(rows) * covariance
            constant_variances += len(rows) * class_constant_variances
    shift = np.asarray(row_moments.shift, np.float64)
    return SufficientStatistics(
        kind,
        row_moments.y,
        row_moments.cross.T,
        row_moments.unweighted_square_sum,
        shift,
        scatter_matrix,
        constant_variances,
    )


def fit_from_statistics(pipeline: Pipeline, statistics: SufficientStatistics) -> Pipeline:
    """Fit a scaler and a closed-form head in place, with the result of a fit to the rows; classes are 0 to k - 1.

    Raises
    ------
    ValueError
        If a class has no rows, or the statistics are not of the kind that the head needs.
    """
    scaler, head = pipeline[0], pipeline[-1]
    if (kind := find_statistics_kind(pipeline)[0]) != statistics.kind:
        raise ValueError(f"{type(head).__name__} needs statistics of kind {kind}, not {statistics.kind}")
    if not statistics.counts.all():
        raise ValueError(f"class {int(statistics.counts.argmin())} has no rows")
    classes = np.arange(len(statistics.counts))
    scaled_moments = standardize_moments(scaler, statistics.to_moments())
    if isinstance(head, RidgeClassifier):
        fit_ridge_classifier_from_moments(head, scaled_moments, classes)
    elif type(head) is NearestCentroid:
        fit_centroid_from_moments(head, scaled_moments, classes)
    elif statistics.kind == "gram":
        fit_lda_from_moments(head, scaled_moments, classes)
    else:
        scale = get_center_and_scale(scaler, len(statistics.shift))[1]
        covariance = statistics.scatter_matrix / scale / scale[:, None] + np.diag(statistics.constant_variances)
        fit_lda_from_moments(head, scaled_moments, classes, covariance / statistics.n_rows)
    head.n_features_in_ = len(statistics.shift)
    return pipeline
