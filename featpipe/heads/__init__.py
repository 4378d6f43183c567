"""Heads: scikit-learn estimators on embeddings, listed in one registry.

Importing this package is cheap: scikit-learn is imported with the first estimator, torch with the first fit that needs
it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    nearness,
)
from featpipe.runtime import lazy_imports

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
else:
    __getattr__, __dir__ = lazy_imports(__name__)

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
