"""Heads: estimators on features, behind one table.

Importing this room is cheap: scikit-learn comes with the first estimator, torch with the first fit that needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from featpipe.heads.settings import parse_settings
from featpipe.heads.storage import TRUSTED, dumps, loads, refuse_unsavable
from featpipe.heads.table import TABLE, TASKS, HeadSpec, Task, build, describe, names, settings_of, spec_of

if TYPE_CHECKING:
    from featpipe.heads.path import SoftmaxRegressionCV
    from featpipe.heads.softmax import SoftmaxRegression
    from featpipe.heads.streaming import fit_streamed
    from featpipe.heads.torch_heads import LinearClassifier, LinearRegressor, MLPClassifier, MLPRegressor

__all__ = [
    "TABLE",
    "TASKS",
    "TRUSTED",
    "HeadSpec",
    "LinearClassifier",
    "LinearRegressor",
    "MLPClassifier",
    "MLPRegressor",
    "SoftmaxRegression",
    "SoftmaxRegressionCV",
    "Task",
    "build",
    "describe",
    "dumps",
    "fit_streamed",
    "loads",
    "names",
    "parse_settings",
    "refuse_unsavable",
    "settings_of",
    "spec_of",
]


_HOMES = {
    "LinearClassifier": "torch_heads",
    "LinearRegressor": "torch_heads",
    "MLPClassifier": "torch_heads",
    "MLPRegressor": "torch_heads",
    "SoftmaxRegression": "softmax",
    "SoftmaxRegressionCV": "path",
    "fit_streamed": "streaming",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'featpipe.heads' has no attribute {name!r}")
    return getattr(import_module(f"featpipe.heads.{_HOMES[name]}"), name)
