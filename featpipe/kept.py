"""What a model keeps of its training data, so that it can learn more classes without it.

Counts of images, sums over embeddings, the importance of each weight, and, if asked for, some embeddings themselves.
All of it are arrays, in one safetensors block of the model's file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.errors import ConfigError
from featpipe.heads.grown import innermost, layer_of
from featpipe.heads.layer import fisher, hidden
from featpipe.heads.statistics import Statistics, gather, kind_for, takes

__all__ = ["DEFAULT", "SELECTIONS", "Keep", "Kept", "features_of", "herd", "keep_of", "pick"]

DEFAULT = "statistics,importances"
ROWS = 20  # of each class, where rows are asked for without a number
_PARTS = ("statistics", "importances", "rows")
_NETWORK = "network."  # before the names of what is trained below the last layer


@dataclass(frozen=True)
class Keep:
    """What to keep.

    Attributes
    ----------
    statistics : bool
        Class means and one matrix of scatter: d (d + 1) / 2 numbers for embeddings of width d, for ``centroid`` d.
    importances : bool
        The Fisher information of the last layer: as many numbers as it has weights.
    rows : int
        Embeddings of each class, as they are.
    network : bool
        The Fisher information of the weights of the network that were trained, and of the last layer: known where
        images go through the network, which is when it is trained.
    """

    statistics: bool = False
    importances: bool = False
    rows: int = 0
    network: bool = False

    @classmethod
    def of(cls, text: str) -> Keep:
        """As it is typed.

        Raises
        ------
        ConfigError
            If it is something else.

        Examples
        --------
        >>> Keep.of("rows=50,statistics")
        Keep(statistics=True, importances=False, rows=50, network=False)
        >>> bool(Keep.of("none"))
        False
        """
        words = [word.strip() for word in text.split(",") if word.strip()]
        found = cls(**dict.fromkeys(_PARTS[:2], True), rows=ROWS) if words == ["all"] else cls()
        for word in words if words not in (["all"], ["none"]) else []:
            name, equals, number = word.partition("=")
            if name == "rows" and (not equals or re.fullmatch("[1-9][0-9]{0,8}", number)):
                found = replace(found, rows=int(number) if equals else ROWS)
            elif name in (*_PARTS[:2], "network") and not equals:
                found = replace(found, **{name: True})
            else:
                raise ConfigError(
                    f"keep is {text!r}; give none, all, or some of statistics, importances and rows=N, with commas"
                )
        return found

    def __bool__(self) -> bool:
        return self.statistics or self.importances or self.network or self.rows > 0

    def refuse_network(self) -> None:
        """Refuse what embeddings alone do not tell."""
        if self.network:
            raise ConfigError(
                "keep=network: importances of the network are of images that go through it, and embeddings do not; "
                "keep them where the network is trained, with `featpipe expand --unfreeze`"
            )


@dataclass(frozen=True, eq=False)
class Kept:
    """What is kept of the rows that a classifier of k classes was trained on.

    Attributes
    ----------
    counts : ndarray of shape (k,), int64
        Images of each class.
    rows : ndarray of shape (r, d), float32 or float16
        Embeddings; of each class those first that tell most.
    codes : ndarray of shape (r,), int32
        Their classes.
    statistics : Statistics or None
    importances : ndarray of shape (k, p + 1), float32, or None
        See :func:`featpipe.heads.layer.fisher`.
    network : mapping from parameter to ndarray of float32, or None
        The same of weights below the last layer, by the names of :meth:`featpipe.finetuning.job.Job.parameters`.
    """

    counts: NDArray[np.int64]
    rows: NDArray[np.floating]
    codes: NDArray[np.int32]
    statistics: Statistics | None = None
    importances: NDArray[np.float32] | None = None
    network: Mapping[str, NDArray[np.float32]] | None = None

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays().values())

    def facts(self) -> dict[str, Any]:
        """What it is and how large, for ``info``: JSON-able."""
        by_class = np.bincount(self.codes, minlength=len(self.counts))
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
            "rows_a_class": int(by_class.max(initial=0)),
            "bytes": {name: size for name, size in sizes.items() if size},
        }

    def weights(self) -> NDArray[np.float64]:
        """How many images each kept row stands for, shape (r,)."""
        kept = np.bincount(self.codes, minlength=len(self.counts))
        return (self.counts / np.maximum(kept, 1))[self.codes]

    def first(self, n: int) -> Kept:
        """With at most n rows of each class."""
        if not len(self.codes):
            return self
        chosen = np.sort(np.concatenate([np.flatnonzero(self.codes == code)[:n] for code in range(len(self.counts))]))
        return replace(self, rows=self.rows[chosen], codes=self.codes[chosen])

    def regrouped(self, place: NDArray[np.intp], k: int) -> Kept:
        """As of other classes, see :meth:`Statistics.regrouped`; importances of those that are joined add up."""
        stays = place >= 0
        counts = np.zeros(k, np.int64)
        np.add.at(counts, place[stays], self.counts[stays])
        rows = stays[self.codes]
        importances = None
        if self.importances is not None:
            importances = np.zeros((k, self.importances.shape[1]), np.float32)
            np.add.at(importances, place[stays], self.importances[stays])
        return Kept(
            counts,
            self.rows[rows],
            place[self.codes[rows]].astype(np.int32),
            None if self.statistics is None else self.statistics.regrouped(place, k),
            importances,
            self.network,
        )

    def check(self, pipeline: Any) -> None:
        """Refuse what is of embeddings, or of a last layer, of another width than the head's.

        Raises
        ------
        ValueError
        """
        d = int(pipeline[-1].n_features_in_)
        widths = {self.rows.shape[1]} if len(self.rows) else set()
        widths |= {len(self.statistics.shift)} if self.statistics is not None else set()
        layer = layer_of(pipeline[-1])
        own = None if layer is None else layer.W.shape[1] + 1
        if widths - {d} or (self.importances is not None and own not in (None, self.importances.shape[1])):
            raise ValueError(f"what is kept is of other embeddings than those of width {d} that the head takes")
        if self.statistics is not None and not takes(pipeline, self.statistics.kind):
            raise ValueError(f"{type(pipeline[-1]).__name__} does not take statistics of kind {self.statistics.kind}")

    def arrays(self) -> dict[str, NDArray[Any]]:
        found: dict[str, NDArray[Any]] = {"counts": self.counts}
        if len(self.rows):
            found |= {"rows": self.rows, "codes": self.codes}
        if self.importances is not None:
            found["importances"] = self.importances
        if self.statistics is not None:
            found |= {f"statistics.{name}": array for name, array in self.statistics.arrays().items()}
        return found | {_NETWORK + name: array for name, array in (self.network or {}).items()}

    def dumps(self) -> bytes:
        import safetensors.numpy

        return safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in self.arrays().items()})

    @classmethod
    def loads(cls, data: bytes, k: int) -> Kept:
        """From `dumps`; of k classes.

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
        return cls.of(arrays, k)

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[Any]], k: int) -> Kept:
        """From `arrays`, checked."""
        prefix = "statistics."
        sums = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
        statistics = Statistics.of(sums) if sums else None
        network = {name.removeprefix(_NETWORK): array for name, array in arrays.items() if name.startswith(_NETWORK)}
        rows, codes = arrays.get("rows", np.zeros((0, 0), np.float32)), arrays.get("codes", np.zeros(0, np.int32))
        counts, importances = arrays["counts"], arrays.get("importances")
        if counts.shape != (k,) or (counts < 0).any() or counts.dtype != np.int64:
            raise ValueError(f"what is kept counts the images of other classes than the model's {k}")
        if rows.ndim != 2 or codes.shape != (len(rows),) or codes.dtype != np.int32 or rows.dtype.kind != "f":
            raise ValueError("kept rows and their classes are of different shapes")
        if not np.isfinite(rows).all() or (len(codes) and not 0 <= codes.min() <= codes.max() < k):
            raise ValueError("kept rows hold NaN, or classes that there are not")
        if statistics is not None and len(statistics.counts) != k:
            raise ValueError(f"kept statistics are of {len(statistics.counts)} classes, not {k}")
        if importances is not None and (importances.shape[:1] != (k,) or not np.isfinite(importances).all()):
            raise ValueError("kept importances are of other classes, or no numbers")
        if any(array.dtype != np.float32 or not (array >= 0).all() for array in network.values()):
            raise ValueError("kept importances of the network are no numbers of 0 or more")
        return cls(counts, rows, codes, statistics, importances, network or None)


def keep_of(keep: Keep, pipeline: Any, X: Any, y: NDArray[np.integer[Any]], k: int, selection: str = "herding") -> Kept:
    """What to keep of the rows that a pipeline was fitted on.

    Parameters
    ----------
    keep : Keep
    pipeline : Pipeline
        Fitted, of the steps "scale" and "head".
    X : ndarray of shape (n, d)
    y : ndarray of shape (n,)
        Class codes below k.
    k : int
    selection : {"herding", "random"}
    """
    counts = np.bincount(y, minlength=k).astype(np.int64)
    rows, codes = np.zeros((0, X.shape[1]), X.dtype), np.zeros(0, np.int32)
    if keep.rows:
        chosen = pick(selection, features_of(pipeline, X), y, keep.rows)
        rows, codes = np.asarray(X[chosen]), y[chosen].astype(np.int32)
    statistics = gather(kind_for(pipeline)[0], X, y, k) if keep.statistics else None
    importances, layer = None, layer_of(pipeline[-1])
    if keep.importances and layer is not None:
        importances = fisher(layer, features_of(pipeline, X)).astype(np.float32)
    return Kept(counts, rows, codes, statistics, importances)


def features_of(pipeline: Any, X: NDArray[Any]) -> NDArray[Any]:
    """What the last layer of a fitted pipeline sees, shape (n, p)."""
    scaled = pipeline[:-1].transform(X) if pipeline[0] != "passthrough" else X
    return hidden(innermost(pipeline[-1]), scaled)


def herd(Z: NDArray[np.floating], n: int) -> NDArray[np.intp]:
    """Row numbers of at most n rows whose mean is near the mean of all, after each row as near as can be.

    Notes
    -----
    Herding as in iCaRL (Rebuffi et al., CVPR 2017): the first rows of the selection are the selection of fewer rows.

    Examples
    --------
    >>> herd(np.array([[0.0], [4.0], [5.0], [11.0]]), 3)
    array([2, 1, 3])
    """
    Z = np.asarray(Z, np.float64)
    center, norms = Z.mean(axis=0), np.einsum("ij,ij->i", Z, Z)
    total, free = np.zeros_like(center), np.ones(len(Z), bool)
    chosen = []
    for count in range(1, min(n, len(Z)) + 1):
        # |center - (total + z) / count|², but for what is the same for all z
        distance = norms - 2 * Z @ (count * center - total)
        distance[~free] = np.inf
        best = int(distance.argmin())
        chosen.append(best)
        free[best], total = False, total + Z[best]
    return np.array(chosen, np.intp)


def _by_herding(Z: NDArray[np.floating], n: int) -> NDArray[np.intp]:
    return herd(Z, n)


def _at_random(Z: NDArray[np.floating], n: int) -> NDArray[np.intp]:
    return np.random.default_rng(0).permutation(len(Z))[:n]


SELECTIONS = {"herding": _by_herding, "random": _at_random}


def pick(selection: str, Z: NDArray[np.floating], y: NDArray[np.integer[Any]], n: int) -> NDArray[np.intp]:
    """Row numbers of at most n rows of each class, class by class, those first that are to be kept longest."""
    chosen = []
    for code in np.unique(y):
        rows = np.flatnonzero(y == code)
        chosen.append(rows[SELECTIONS[selection](Z[rows], n)])
    return np.concatenate(chosen) if chosen else np.zeros(0, np.intp)
