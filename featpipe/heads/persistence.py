"""Serialise fitted heads to bytes that cannot run code when they are loaded."""

from __future__ import annotations

import importlib
import io
import json
import logging
import sys
import warnings
from copy import copy
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

from featpipe.errors import ModelError

logger = logging.getLogger(__name__)

# Types that may be loaded in addition to those that skops trusts. A constant: a file cannot extend it.
TRUSTED_TYPES: tuple[str, ...] = (
    "featpipe.heads.BayesianRidgeClassifier",
    "featpipe.heads.ExpandedClassifier",
    "featpipe.heads.LinearClassifier",
    "featpipe.heads.LinearRegressor",
    "featpipe.heads.MLPClassifier",
    "featpipe.heads.MLPRegressor",
    "featpipe.heads.SoftmaxRegression",
    "featpipe.heads.SoftmaxRegressionCV",
    "featpipe.heads.nearness",
    "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
    "sklearn.neural_network._stochastic_optimizers.SGDOptimizer",
)

# Former names of types in saved heads, and their present names.
ALIASES: dict[tuple[str, str], tuple[str, str]] = {
    ("featpipe.heads.evidence", "EvidenceRidgeClassifier"): ("featpipe.heads", "BayesianRidgeClassifier"),
    ("featpipe.heads.grown", "GrownClassifier"): ("featpipe.heads", "ExpandedClassifier"),
    ("featpipe.heads.neighbors", "nearness"): ("featpipe.heads", "nearness"),
    ("featpipe.heads.path", "SoftmaxRegressionCV"): ("featpipe.heads", "SoftmaxRegressionCV"),
    ("featpipe.heads.softmax", "SoftmaxRegression"): ("featpipe.heads", "SoftmaxRegression"),
    ("featpipe.heads.torch_heads", "LinearClassifier"): ("featpipe.heads", "LinearClassifier"),
    ("featpipe.heads.torch_heads", "LinearRegressor"): ("featpipe.heads", "LinearRegressor"),
    ("featpipe.heads.torch_heads", "MLPClassifier"): ("featpipe.heads", "MLPClassifier"),
    ("featpipe.heads.torch_heads", "MLPRegressor"): ("featpipe.heads", "MLPRegressor"),
}
_OLD_MODULES = tuple({module.encode() for module, _ in ALIASES})

# Large fitted attributes that no prediction needs: d² values in a head that otherwise has k d.
UNNEEDED_ATTRIBUTES = {"LinearDiscriminantAnalysis": ("covariance_",)}


def dumps(estimator: Any) -> bytes:
    """Serialise a scikit-learn estimator with skops, without the attributes that predictions do not need.

    Raises
    ------
    ModelError
        If skops cannot serialise the estimator, or `loads` would refuse the result.
    """
    skops_io = _import_skops_io()
    estimator_name = type(estimator[-1] if hasattr(estimator, "steps") else estimator).__name__
    try:
        data = skops_io.dumps(_drop_unneeded_attributes(estimator))
    # The exception that skops raises depends on the object.
    except Exception as error:
        raise ModelError(f"{estimator_name} cannot be saved: {_format_error(error)}; choose a built-in head") from error
    try:
        loads(data)
    except ModelError as error:
        raise ModelError(f"{estimator_name} cannot be saved so that it loads again: {error}") from error
    return data


def _drop_unneeded_attributes(estimator: Any) -> Any:
    if hasattr(estimator, "steps"):
        name, last_step = estimator.steps[-1]
        lean_step = _drop_unneeded_attributes(last_step)
        if lean_step is last_step:
            return estimator
        pipeline = copy(estimator)
        pipeline.steps = [*estimator.steps[:-1], (name, lean_step)]
        return pipeline
    unneeded = [key for key in UNNEEDED_ATTRIBUTES.get(type(estimator).__name__, ()) if hasattr(estimator, key)]
    if unneeded:
        estimator = copy(estimator)
        for key in unneeded:
            delattr(estimator, key)
    return estimator


def check_savable(estimator: Any) -> None:
    """Refuse an estimator that cannot be saved, before the time of a real fit is spent.

    Parameters
    ----------
    estimator : estimator
        An unfitted classifier or regressor; a clone is fitted to a few random rows.

    Raises
    ------
    ModelError
    """
    import numpy as np
    from sklearn.base import clone

    X = np.random.default_rng(0).normal(size=(24, 4)).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fitted = clone(estimator).fit(X, np.arange(24) % 2)
        except ValueError:  # settings that do not suit these few rows
            return
    dumps(fitted)


def loads(data: bytes) -> Any:
    """Read an estimator that `dumps` wrote.

    Raises
    ------
    ModelError
        If the bytes are damaged, name a type that is not trusted, or hold no estimator.
    """
    skops_io = _import_skops_io()
    from sklearn.base import BaseEstimator
    from sklearn.exceptions import InconsistentVersionWarning
    from skops.io.exceptions import UntrustedTypesFoundException

    _check_zip(data)
    try:
        data = _rename_aliases(data)
        untrusted = sorted(set(skops_io.get_untrusted_types(data=data)) - set(TRUSTED_TYPES))
        if untrusted:
            raise ModelError(
                f"the head holds {', '.join(untrusted)}, which may not be loaded; train again with a built-in head"
            )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", InconsistentVersionWarning)
            estimator = skops_io.loads(data, trusted=list(TRUSTED_TYPES))
    except ModelError:
        raise
    except UntrustedTypesFoundException as error:
        raise ModelError(f"the head holds a type that may not be loaded: {_format_error(error)}") from error
    # The exception for damaged bytes depends on whether skops, json or numpy fails first.
    except Exception as error:
        raise ModelError(
            f"the head is damaged ({_format_error(error)}); copy the model again or train it again"
        ) from error
    if not isinstance(estimator, BaseEstimator):
        raise ModelError(f"the head is a {type(estimator).__name__}, not an estimator; train it again")
    for warning in caught:
        if isinstance(warning.message, InconsistentVersionWarning):
            logger.warning(
                "the head was saved with scikit-learn %s and is read with %s: predictions may differ; "
                "check some predictions, or train it again",
                warning.message.original_sklearn_version,
                warning.message.current_sklearn_version,
            )
            break
    return estimator


def _import_skops_io() -> Any:
    """Import ``skops.io`` without importing torch, unless torch is imported already.

    skops imports all packages of scikit-learn to list its estimators, including one that wraps torch, which would cost
    every command that reads a model two seconds. skops skips packages that cannot be imported.
    """
    torch_wrapper = "sklearn.externals.array_api_compat.torch"
    if "skops.io" in sys.modules or "torch" in sys.modules:
        return importlib.import_module("skops.io")
    sys.modules[torch_wrapper] = None  # type: ignore[assignment]  # makes the import fail
    try:
        return importlib.import_module("skops.io")
    finally:
        del sys.modules[torch_wrapper]


def _check_zip(data: bytes) -> None:
    """Refuse a zip with compressed or overlapping members, which skops does not write: it could be a zip bomb."""
    try:
        with ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            damaged_member = (
                archive.testzip()
                if all(member.compress_type == ZIP_STORED for member in members)
                else "a compressed member"
            )
    except (BadZipFile, EOFError, NotImplementedError, OSError, RuntimeError, ValueError) as error:
        raise ModelError(
            f"the head is damaged ({_format_error(error)}); copy the model again or train it again"
        ) from error
    if damaged_member is not None or sum(member.file_size for member in members) > len(data):
        raise ModelError(f"the head is damaged ({damaged_member or 'overlapping members'}); copy the model again")


def _rename_aliases(data: bytes) -> bytes:
    """Replace former type names in the schema by the present ones."""
    with ZipFile(io.BytesIO(data)) as archive:
        schema = archive.read("schema.json")
        if not any(module in schema for module in _OLD_MODULES):
            return data
        members = {name: archive.read(name) for name in archive.namelist()}

    def rename(node: dict[str, Any]) -> dict[str, Any]:
        name = node.get("__module__"), node.get("__class__")
        if all(isinstance(part, str) for part in name) and name in ALIASES:
            node["__module__"], node["__class__"] = ALIASES[name]
        return node

    members["schema.json"] = json.dumps(json.loads(schema, object_hook=rename)).encode()
    renamed = io.BytesIO()
    with ZipFile(renamed, "w") as archive:
        for member_name, content in members.items():
            archive.writestr(member_name, content)
    return renamed.getvalue()


def _format_error(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
