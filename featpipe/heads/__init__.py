"""Heads: scikit-learn estimators on embeddings, listed in one registry.

Importing this package is cheap: scikit-learn is imported with the first estimator, torch with the first fit that needs
it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from featpipe.heads.knn import nearness
from featpipe.heads.neural.losses import LossFunction
from featpipe.heads.neural.train import forward
from featpipe.heads.persistence import TRUSTED_TYPES, check_savable, dumps, loads
from featpipe.heads.registry import (
    HEAD_REGISTRY,
    HeadSpec,
    build,
    describe,
    get_settings,
    get_spec,
    list_heads,
)

if TYPE_CHECKING:
    from featpipe.heads.closed_form.out_of_core import fit_streamed
    from featpipe.heads.closed_form.solve import BayesianRidgeClassifier
    from featpipe.heads.closed_form.sufficient_statistics import (
        SufficientStatistics,
        accepts_statistics,
        compute_statistics,
        find_statistics_kind,
        fit_from_statistics,
        make_closed_form_head,
    )
    from featpipe.heads.expanded import (
        ExpandedClassifier,
        get_base_head,
        make_expanded_head,
        merge_class_scores,
        merge_last_layer_rows,
        resolve_last_layer,
    )
    from featpipe.heads.last_layer import (
        LastLayer,
        compute_fisher_diagonal,
        compute_hidden_features,
        get_l2_strength,
        replace_last_layer,
    )
    from featpipe.heads.logistic.cv import C_GRID, SoftmaxRegressionCV, map_folds, select_best_C
    from featpipe.heads.logistic.estimator import SoftmaxRegression
    from featpipe.heads.neural.estimators import LinearClassifier, LinearRegressor, MLPClassifier, MLPRegressor
    from featpipe.heads.resampling import BalancedClassifier, draw_row_indices, fit_balanced, resample

__all__ = [
    "C_GRID",
    "HEAD_REGISTRY",
    "TRUSTED_TYPES",
    "BalancedClassifier",
    "BayesianRidgeClassifier",
    "ExpandedClassifier",
    "HeadSpec",
    "LastLayer",
    "LinearClassifier",
    "LinearRegressor",
    "LossFunction",
    "MLPClassifier",
    "MLPRegressor",
    "SoftmaxRegression",
    "SoftmaxRegressionCV",
    "SufficientStatistics",
    "accepts_statistics",
    "build",
    "check_savable",
    "compute_fisher_diagonal",
    "compute_hidden_features",
    "compute_statistics",
    "describe",
    "draw_row_indices",
    "dumps",
    "find_statistics_kind",
    "fit_balanced",
    "fit_from_statistics",
    "fit_streamed",
    "forward",
    "get_base_head",
    "get_l2_strength",
    "get_settings",
    "get_spec",
    "list_heads",
    "loads",
    "make_closed_form_head",
    "make_expanded_head",
    "map_folds",
    "merge_class_scores",
    "merge_last_layer_rows",
    "nearness",
    "replace_last_layer",
    "resample",
    "resolve_last_layer",
    "select_best_C",
]

_LAZY_MODULES = {  # imported when first used: they need torch or scikit-learn
    "BalancedClassifier": "resampling",
    "BayesianRidgeClassifier": "closed_form.solve",
    "C_GRID": "logistic.cv",
    "ExpandedClassifier": "expanded",
    "LastLayer": "last_layer",
    "LinearClassifier": "neural.estimators",
    "LinearRegressor": "neural.estimators",
    "MLPClassifier": "neural.estimators",
    "MLPRegressor": "neural.estimators",
    "SoftmaxRegression": "logistic.estimator",
    "SoftmaxRegressionCV": "logistic.cv",
    "SufficientStatistics": "closed_form.sufficient_statistics",
    "accepts_statistics": "closed_form.sufficient_statistics",
    "compute_fisher_diagonal": "last_layer",
    "compute_hidden_features": "last_layer",
    "compute_statistics": "closed_form.sufficient_statistics",
    "draw_row_indices": "resampling",
    "find_statistics_kind": "closed_form.sufficient_statistics",
    "fit_balanced": "resampling",
    "fit_from_statistics": "closed_form.sufficient_statistics",
    "fit_streamed": "closed_form.out_of_core",
    "get_base_head": "expanded",
    "get_l2_strength": "last_layer",
    "make_closed_form_head": "closed_form.sufficient_statistics",
    "make_expanded_head": "expanded",
    "map_folds": "logistic.cv",
    "merge_class_scores": "expanded",
    "merge_last_layer_rows": "expanded",
    "replace_last_layer": "last_layer",
    "resample": "resampling",
    "resolve_last_layer": "expanded",
    "select_best_C": "logistic.cv",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY_MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
