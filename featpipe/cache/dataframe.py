"""Conversion of a cache to a pandas or Arrow table."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featpipe.cache.format import SPLIT_NAMES
from featpipe.config import unknown_name_error
from featpipe.errors import ConfigError

if TYPE_CHECKING:
    from featpipe.cache.reader import FeatureCache


def to_frame(cache: FeatureCache, kind: str, output: str | None) -> Any:
    """Convert the rows of a cache to a table, with the features of ``output`` if it is given."""
    if kind not in ("pandas", "arrow"):
        raise unknown_name_error("kind of table", kind, ["pandas", "arrow"])
    try:
        return _to_pandas(cache, output) if kind == "pandas" else _to_arrow(cache, output)
    except ImportError as error:
        name = error.name or kind
        raise ConfigError(f"to_frame({kind!r}) needs {name}, which is not installed; `pip install {name}`") from None


def _to_pandas(cache: FeatureCache, output: str | None) -> Any:
    import pandas as pd

    status_names, status_codes = np.unique(cache.status, return_inverse=True)
    columns: dict[str, Any] = {"id": list(cache.ids)}
    columns["status"] = pd.Categorical.from_codes(status_codes, status_names.tolist())
    columns["split"] = pd.Categorical.from_codes(cache.split.astype(np.int8), list(SPLIT_NAMES))
    labels = cache.label_table
    if cache.task == "classification":
        columns["label"] = pd.Categorical.from_codes(labels.values, list(cache.classes))
    elif cache.task == "multilabel":
        columns["labels"] = _list_label_sets(cache)
    elif cache.task == "regression":
        columns |= {name: labels.values[:, i] for i, name in enumerate(cache.classes)}
    frame = pd.DataFrame(columns)
    if output is None:
        return frame
    flat_features = _load_flat_features(cache, output)
    features_frame = pd.DataFrame(
        flat_features, columns=[f"{output}.{i}" for i in range(flat_features.shape[1])], copy=False
    )
    return pd.concat([frame, features_frame], axis=1)


def _load_flat_features(cache: FeatureCache, output: str) -> NDArray[np.floating]:
    return cache.features(output).reshape(len(cache), math.prod(cache.shapes[output]))


def _to_arrow(cache: FeatureCache, output: str | None) -> Any:
    import pyarrow as pa

    ids = cache.ids
    offsets = pa.py_buffer(np.ascontiguousarray(ids.offsets))
    columns: dict[str, Any] = {
        "id": pa.LargeStringArray.from_buffers(len(cache), offsets, pa.py_buffer(np.ascontiguousarray(ids.data))),
        "status": pa.array(cache.status).dictionary_encode(),
        "split": pa.DictionaryArray.from_arrays(pa.array(cache.split.astype(np.int8)), pa.array(SPLIT_NAMES)),
    }
    labels = cache.label_table
    if cache.task == "classification":
        codes = pa.array(labels.values, mask=labels.values < 0)
        columns["label"] = pa.DictionaryArray.from_arrays(codes, pa.array(cache.classes, pa.string()))
    elif cache.task == "multilabel":
        columns["labels"] = pa.array(_list_label_sets(cache), pa.list_(pa.string()))
    elif cache.task == "regression":
        columns |= {name: pa.array(labels.values[:, i], from_pandas=True) for i, name in enumerate(cache.classes)}
    if output is not None:
        flat_features = _load_flat_features(cache, output)
        values = pa.array(flat_features.reshape(-1))
        if flat_features.shape[1]:
            columns[output] = pa.FixedSizeListArray.from_arrays(values, flat_features.shape[1])
        else:  # Arrow has no fixed-size lists of size zero
            columns[output] = pa.array([[]] * len(flat_features), pa.list_(values.type))
    return pa.table(columns)


def _list_label_sets(cache: FeatureCache) -> list[list[str] | None]:
    """List the labels of each sample of a multi-label cache; None for unlabelled samples."""
    classes = cache.classes
    return [
        None if len(row) and row[0] < 0 else [classes[i] for i in np.flatnonzero(row)]
        for row in cache.label_table.values
    ]
