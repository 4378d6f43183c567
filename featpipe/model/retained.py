"""Data that a model retains from its training, so that classes can be added without the training images.

The data are image counts, sums over embeddings, the importance of each weight, and optionally some embeddings. They are
stored as arrays in one safetensors member of the model file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.errors import ConfigError
from featpipe.heads import (
    SufficientStatistics,
    accepts_statistics,
    compute_fisher_diagonal,
    compute_hidden_features,
    compute_statistics,
    find_statistics_kind,
    get_base_head,
    resolve_last_layer,
)

DEFAULT_RETENTION = "statistics,importances"
DEFAULT_EXEMPLARS_PER_CLASS = 20  # of ``rows`` without a number
_RETENTION_PARTS = ("statistics", "importances", "rows")
_STATISTICS_PREFIX, _NETWORK_PREFIX = "statistics.", "network."  # of arrays' names


@dataclass(frozen=True)
class RetentionPolicy:
    """Which data a model retains.

    Attributes
    ----------
    statistics : bool
        Class means and one scatter matrix: d (d + 1) / 2 numbers for embeddings of width d; d for ``centroid``.
    importances : bool
        The Fisher information of the last layer: as many numbers as it has weights.
    rows : int
        Number of embeddings of each class to retain.
    network : bool
        The Fisher information of the trained weights of the network, and of the last layer. It can be computed only
        while the network is trained, because images must pass through the network.
    """

    statistics: bool = False
    importances: bool = False
    rows: int = 0
    network: bool = False

    @classmethod
    def from_text(cls, text: str) -> RetentionPolicy:
        """Parse the value of ``--keep``.

        Raises
        ------
        ConfigError
            If it is not a list of known parts.

        Examples
        --------
        >>> RetentionPolicy.from_text("rows=50,statistics")
        RetentionPolicy(statistics=True, importances=False, rows=50, network=False)
        >>> bool(RetentionPolicy.from_text("none"))
        False
        """
        words = [word.strip() for word in text.split(",") if word.strip()]
        policy = (
            cls(**dict.fromkeys(_RETENTION_PARTS[:2], True), rows=DEFAULT_EXEMPLARS_PER_CLASS)
            if words == ["all"]
            else cls()
        )
        for word in words if words not in (["all"], ["none"]) else []:
            name, equals, number = word.partition("=")
            if name == "rows" and (not equals or re.fullmatch("[1-9][0-9]{0,8}", number)):
                policy = replace(policy, rows=int(number) if equals else DEFAULT_EXEMPLARS_PER_CLASS)
            elif name in (*_RETENTION_PARTS[:2], "network") and not equals:
                policy = replace(policy, **{name: True})
            else:
                raise ConfigError(
                    f"keep is {text!r}; expected none, all, or a list of statistics, importances, network and rows=N"
                )
        return policy

    def __bool__(self) -> bool:
        return self.statistics or self.importances or self.network or self.rows > 0

    def raise_if_network(self) -> None:
        """Raise if importances of the network are requested: they cannot be computed from embeddings."""
        if self.network:
            raise ConfigError(
                "keep=network: the importances of a network need a pass of images through it, and embeddings are not "
                "enough; retain them when the network is trained, with `featpipe expand --unfreeze`"
            )


@dataclass(frozen=True, eq=False)
class ReplayMemory:
    """Data retained from the training rows of a classifier with k classes.

    Attributes
    ----------
    counts : ndarray of shape (k,), int64
        Images of each class.
    rows : ndarray of shape (r, d), float32 or float16
        Embeddings; the most representative of each class come first.
    codes : ndarray of shape (r,), int32
        Class codes of the rows.
    statistics : SufficientStatistics or None
    importances : ndarray of shape (k, p + 1), float32, or None
        See :func:`featpipe.heads.compute_fisher_diagonal`.
    network : mapping from parameter to ndarray of float32, or None
        The Fisher information of weights below the last layer, by the names of
        ``featpipe.finetuning.trainer.Trainer.trained_parameters``.
    """

    counts: NDArray[np.int64]
    rows: NDArray[np.floating]
    codes: NDArray[np.int32]
    statistics: SufficientStatistics | None = None
    importances: NDArray[np.float32] | None = None
    network: Mapping[str, NDArray[np.float32]] | None = None

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.to_arrays().values())

    def to_summary(self) -> dict[str, Any]:
        """Contents and sizes, shown by ``featpipe info``."""
        exemplar_counts = np.bincount(self.codes, minlength=len(self.counts))
        statistics, importances = self.statistics, self.importances
        sizes = {
            "rows": self.rows.nbytes + self.codes.nbytes if len(self.rows) else 0,
            "statistics": statistics.nbytes if statistics is not None else 0,
            "importances": importances.nbytes if importances is not None else 0,
            "network": sum(array.nbytes for array in (self.network or {}).values()),
        }
        return {
            "images": int(self.counts.sum()),
            "rows": len(self.rows),
            "rows_a_class": int(exemplar_counts.max(initial=0)),
            "bytes": {name: size for name, size in sizes.items() if size},
        }

    def exemplar_weights(self) -> NDArray[np.float64]:
        """The number of images that each retained row represents, shape (r,)."""
        exemplar_counts = np.bincount(self.codes, minlength=len(self.counts))
        return (self.counts / np.maximum(exemplar_counts, 1))[self.codes]

    def truncate(self, n: int) -> ReplayMemory:
        """Keep the first n rows of each class."""
        if not len(self.codes):
            return self
        selected_rows = np.sort(
            np.concatenate([np.flatnonzero(self.codes == code)[:n] for code in range(len(self.counts))])
        )
        return replace(self, rows=self.rows[selected_rows], codes=self.codes[selected_rows])

    def remap_classes(self, class_map: NDArray[np.intp], k: int) -> ReplayMemory:
        """Map to other classes as :meth:`SufficientStatistics.remap_classes`; importances of merged classes add up."""
        is_retained = class_map >= 0
        counts = np.zeros(k, np.int64)
        np.add.at(counts, class_map[is_retained], self.counts[is_retained])
        row_mask = is_retained[self.codes]
        importances = None
        if self.importances is not None:
            importances = np.zeros((k, self.importances.shape[1]), np.float32)
            np.add.at(importances, class_map[is_retained], self.importances[is_retained])
        return ReplayMemory(
            counts,
            self.rows[row_mask],
            class_map[self.codes[row_mask]].astype(np.int32),
            None if self.statistics is None else self.statistics.remap_classes(class_map, k),
            importances,
            self.network,
        )

    def check_compatible(self, pipeline: Any) -> None:
        """Raise if the embeddings or the last layer have another width than those of the head.

        Raises
        ------
        ValueError
        """
        d = int(pipeline[-1].n_features_in_)
        widths = {self.rows.shape[1]} if len(self.rows) else set()
        widths |= {len(self.statistics.shift)} if self.statistics is not None else set()
        layer = resolve_last_layer(pipeline[-1])
        layer_width = None if layer is None else layer.W.shape[1] + 1
        if widths - {d} or (self.importances is not None and layer_width not in (None, self.importances.shape[1])):
            raise ValueError(f"the widths of the retained embeddings or importances differ from the {d} of the head")
        if self.statistics is not None and not accepts_statistics(pipeline, self.statistics.kind):
            raise ValueError(f"{type(pipeline[-1]).__name__} cannot use statistics of kind {self.statistics.kind}")

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        arrays: dict[str, NDArray[Any]] = {"counts": self.counts}
        if len(self.rows):
            arrays |= {"rows": self.rows, "codes": self.codes}
        if self.importances is not None:
            arrays["importances"] = self.importances
        if self.statistics is not None:
            arrays |= {_STATISTICS_PREFIX + name: array for name, array in self.statistics.to_arrays().items()}
        return arrays | {_NETWORK_PREFIX + name: array for name, array in (self.network or {}).items()}

    def to_bytes(self) -> bytes:
        import safetensors.numpy

        return safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in self.to_arrays().items()})

    @classmethod
    def from_bytes(cls, data: bytes, k: int) -> ReplayMemory:
        """Load what :meth:`to_bytes` wrote, for k classes.

        Raises
        ------
        ValueError
            If the arrays are damaged or do not fit together.
        """
        import safetensors.numpy

        try:
            arrays = safetensors.numpy.load(data)
        except safetensors.SafetensorError as error:
            raise ValueError(str(error)) from None
        statistics_arrays, network = (
            {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
            for prefix in (_STATISTICS_PREFIX, _NETWORK_PREFIX)
        )
        statistics = SufficientStatistics.from_arrays(statistics_arrays) if statistics_arrays else None
        rows, codes = arrays.get("rows", np.zeros((0, 0), np.float32)), arrays.get("codes", np.zeros(0, np.int32))
        counts, importances = arrays["counts"], arrays.get("importances")
        if counts.shape != (k,) or (counts < 0).any() or counts.dtype != np.int64:
            raise ValueError(f"retained counts have shape {counts.shape}, expected one number for each of {k} classes")
        if rows.ndim != 2 or codes.shape != (len(rows),) or codes.dtype != np.int32 or rows.dtype.kind != "f":
            raise ValueError(
                f"retained rows are {rows.dtype} {rows.shape} and their class codes {codes.dtype} {codes.shape}"
            )
        if not np.isfinite(rows).all() or (len(codes) and not 0 <= codes.min() <= codes.max() < k):
            raise ValueError(f"retained rows contain NaN, or class codes outside 0 to {k - 1}")
        if statistics is not None and len(statistics.counts) != k:
            raise ValueError(f"retained statistics are of {len(statistics.counts)} classes, expected {k}")
        if importances is not None and (importances.shape[:1] != (k,) or not np.isfinite(importances).all()):
            raise ValueError(f"retained importances have shape {importances.shape} or contain NaN, expected {k} rows")
        if any(array.dtype != np.float32 or not (array >= 0).all() for array in network.values()):
            raise ValueError("retained importances of the network are not all numbers of 0 or more")
        return cls(counts, rows, codes, statistics, importances, network or None)


def collect_replay_memory(
    policy: RetentionPolicy, pipeline: Any, X: Any, y: NDArray[np.integer[Any]], k: int, selection: str = "herding"
) -> ReplayMemory:
    """Collect the data to retain from the rows that a pipeline was fitted on.

    Parameters
    ----------
    policy : RetentionPolicy
    pipeline : Pipeline
        Fitted, with the steps "scale" and "head".
    X : ndarray of shape (n, d)
    y : ndarray of shape (n,)
        Class codes below k.
    k : int
    selection : {"herding", "random"}
    """
    counts = np.bincount(y, minlength=k).astype(np.int64)
    rows, codes = np.zeros((0, X.shape[1]), X.dtype), np.zeros(0, np.int32)
    if policy.rows:
        selected_rows = select_exemplars(selection, compute_penultimate_features(pipeline, X), y, policy.rows)
        rows, codes = np.asarray(X[selected_rows]), y[selected_rows].astype(np.int32)
    statistics = compute_statistics(find_statistics_kind(pipeline)[0], X, y, k) if policy.statistics else None
    importances, layer = None, resolve_last_layer(pipeline[-1])
    if policy.importances and layer is not None:
        importances = compute_fisher_diagonal(layer, compute_penultimate_features(pipeline, X)).astype(np.float32)
    return ReplayMemory(counts, rows, codes, statistics, importances)


def compute_penultimate_features(pipeline: Any, X: NDArray[Any]) -> NDArray[Any]:
    """The inputs of the last layer of a fitted pipeline, shape (n, p)."""
    scaled_X = pipeline[:-1].transform(X) if pipeline[0] != "passthrough" else X
    return compute_hidden_features(get_base_head(pipeline[-1]), scaled_X)


def select_by_herding(Z: NDArray[np.floating], n: int) -> NDArray[np.intp]:
    """Select up to n rows greedily so that after each one the mean of the selection is nearest to the mean of all rows.

    Notes
    -----
    Herding as in iCaRL (Rebuffi et al., CVPR 2017): a selection of fewer rows is a prefix of this one.

    Examples
    --------
    >>> select_by_herding(np.array([[0.0], [4.0], [5.0], [11.0]]), 3)
    array([2, 1, 3])
    """
    Z = np.asarray(Z, np.float64)
    center, norms = Z.mean(axis=0), np.einsum("ij,ij->i", Z, Z)
    total, available = np.zeros_like(center), np.ones(len(Z), bool)
    selected_rows = []
    for count in range(1, min(n, len(Z)) + 1):
        # |center - (total + z) / count|² up to a factor and a term that do not depend on z
        distance = norms - 2 * Z @ (count * center - total)
        distance[~available] = np.inf
        best_row = int(distance.argmin())
        selected_rows.append(best_row)
        available[best_row], total = False, total + Z[best_row]
    return np.array(selected_rows, np.intp)


def _select_random(Z: NDArray[np.floating], n: int) -> NDArray[np.intp]:
    return np.random.default_rng(0).permutation(len(Z))[:n]


EXEMPLAR_SELECTORS = {"herding": select_by_herding, "random": _select_random}


def select_exemplars(selection: str, Z: NDArray[np.floating], y: NDArray[np.integer[Any]], n: int) -> NDArray[np.intp]:
    """Row numbers of up to n rows of each class, class by class, in decreasing priority."""
    selected_rows = []
    for code in np.unique(y):
        rows = np.flatnonzero(y == code)
        selected_rows.append(rows[EXEMPLAR_SELECTORS[selection](Z[rows], n)])
    return np.concatenate(selected_rows) if selected_rows else np.zeros(0, np.intp)
