"""Fitted heads as bytes that can run no code when they are read."""

from __future__ import annotations

import importlib
import io
import sys
import warnings
from copy import copy
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

from featpipe.errors import ModelError

__all__ = ["TRUSTED_TYPES", "check_savable", "dumps", "loads"]

# What may be built beside numpy and the estimators that skops knows. A constant: never what the bytes ask for.
TRUSTED_TYPES: tuple[str, ...] = (
    "featpipe.heads.closed_form.solve.EvidenceRidgeClassifier",
    "featpipe.heads.expanded.GrownClassifier",
    "featpipe.heads.knn.nearness",
    "featpipe.heads.logistic.cv.SoftmaxRegressionCV",
    "featpipe.heads.logistic.estimator.SoftmaxRegression",
    "featpipe.heads.neural.estimators.LinearClassifier",
    "featpipe.heads.neural.estimators.LinearRegressor",
    "featpipe.heads.neural.estimators.MLPClassifier",
    "featpipe.heads.neural.estimators.MLPRegressor",
    "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
    "sklearn.neural_network._stochastic_optimizers.SGDOptimizer",
)


# Learnt and large, and no answer needs it: d² numbers of a head that has k d.
UNNEEDED_ATTRIBUTES = {"LinearDiscriminantAnalysis": ("covariance_",)}


def dumps(estimator: Any) -> bytes:
    """Write a scikit-learn estimator, as skops does, without what its answers do not need.

    Raises
    ------
    ModelError
        If `loads` would refuse what was written.
    """
    skops_io = _import_skops_io()
    estimator_name = type(estimator[-1] if hasattr(estimator, "steps") else estimator).__name__
    try:
        data = skops_io.dumps(_drop_unneeded_attributes(estimator))
    # What skops raises on an object that it cannot take depends on the object.
    except Exception as error:
        raise ModelError(
            f"{estimator_name} cannot be saved: {_format_error(error)}; use a head of the table"
        ) from error
    try:
        loads(data)
    except ModelError as error:
        raise ModelError(f"{estimator_name} cannot be saved so that it loads again: {error}") from error
    return data


def _drop_unneeded_attributes(estimator: Any) -> Any:
    """The estimator, or a shallow copy without what is not needed."""
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
    """Refuse an estimator that could not be saved once it is fitted, before that work is done.

    Parameters
    ----------
    estimator : estimator
        A classifier or a regressor, not fitted; a copy of it is fitted on a few rows.

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
        except ValueError:  # settings for other data than these few rows
            return
    dumps(fitted)


def loads(data: bytes) -> Any:
    """Read an estimator that `dumps` wrote.

    Raises
    ------
    ModelError
        If the bytes are damaged, hold a type that is not trusted, or no estimator.
    """
    skops_io = _import_skops_io()
    from sklearn.base import BaseEstimator
    from skops.io.exceptions import UntrustedTypesFoundException

    _check_zip(data)
    try:
        untrusted = sorted(set(skops_io.get_untrusted_types(data=data)) - set(TRUSTED_TYPES))
        if untrusted:
            raise ModelError(
                f"the head holds {', '.join(untrusted)}, which may not be loaded; train again with a head of the table"
            )
        estimator = skops_io.loads(data, trusted=list(TRUSTED_TYPES))
    except ModelError:
        raise
    except UntrustedTypesFoundException as error:
        raise ModelError(f"the head holds a type that may not be loaded: {_format_error(error)}") from error
    # Damaged bytes surface wherever skops, json or numpy first stumble over them.
    except Exception as error:
        raise ModelError(
            f"the head is damaged ({_format_error(error)}); copy the model again or train it again"
        ) from error
    if not isinstance(estimator, BaseEstimator):
        raise ModelError(f"the head is a {type(estimator).__name__}, not an estimator; train it again")
    return estimator


def _import_skops_io() -> Any:
    """The module, imported without torch where that is not there yet.

    To learn the names of scikit-learn's estimators skops imports all of its packages, the one that wraps torch among
    them: two seconds for every command that reads a model. A package that cannot be imported is passed over.
    """
    torch_wrapper = "sklearn.externals.array_api_compat.torch"
    if "skops.io" in sys.modules or "torch" in sys.modules:
        return importlib.import_module("skops.io")
    sys.modules[torch_wrapper] = None  # type: ignore[assignment]  # the language's own way to say: not to be had
    try:
        return importlib.import_module("skops.io")
    finally:
        del sys.modules[torch_wrapper]


def _check_zip(data: bytes) -> None:
    """Refuse a zip that unpacks to more than it holds: skops stores members as they are."""
    try:
        with ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            damaged_member = (
                archive.testzip()
                if all(member.compress_type == ZIP_STORED for member in members)
                else "a packed member"
            )
    except (BadZipFile, EOFError, NotImplementedError, OSError, RuntimeError, ValueError) as error:
        raise ModelError(
            f"the head is damaged ({_format_error(error)}); copy the model again or train it again"
        ) from error
    if damaged_member is not None or sum(member.file_size for member in members) > len(data):
        raise ModelError(f"the head is damaged ({damaged_member or 'overlapping members'}); copy the model again")


def _format_error(error: BaseException) -> str:
    """The error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
