"""Heads: estimators on features, behind one table.

Importing this room is cheap: scikit-learn comes with the first estimator, torch with the first fit that needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from featpipe.heads.settings import parse_settings
from featpipe.heads.storage import TRUSTED_TYPES, check_savable, dumps, loads
from featpipe.heads.table import (
    HEAD_REGISTRY,
    HEAD_TASKS,
    HeadSpec,
    HeadTask,
    build,
    describe,
    get_settings,
    get_spec,
    list_heads,
)

if TYPE_CHECKING:
    from featpipe.heads.path import SoftmaxRegressionCV
    from featpipe.heads.softmax import SoftmaxRegression
    from featpipe.heads.streaming import fit_streamed
    from featpipe.heads.torch_heads import LinearClassifier, LinearRegressor, MLPClassifier, MLPRegressor

__all__ = [
    "HEAD_REGISTRY",
    "HEAD_TASKS",
    "TRUSTED_TYPES",
    "HeadSpec",
    "HeadTask",
    "LinearClassifier",
    "LinearRegressor",
    "MLPClassifier",
    "MLPRegressor",
    "SoftmaxRegression",
    "SoftmaxRegressionCV",
    "build",
    "check_savable",
    "describe",
    "dumps",
    "fit_streamed",
    "get_settings",
    "get_spec",
    "list_heads",
    "loads",
    "parse_settings",
]


_LAZY_MODULES = {
    "LinearClassifier": "torch_heads",
    "LinearRegressor": "torch_heads",
    "MLPClassifier": "torch_heads",
    "MLPRegressor": "torch_heads",
    "SoftmaxRegression": "softmax",
    "SoftmaxRegressionCV": "path",
    "fit_streamed": "streaming",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY_MODULES:
        raise AttributeError(f"module 'featpipe.heads' has no attribute {name!r}")
    return getattr(import_module(f"featpipe.heads.{_LAZY_MODULES[name]}"), name)
