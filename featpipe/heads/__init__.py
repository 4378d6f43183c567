"""Heads: estimators on features, behind one table.

Importing this room is cheap: scikit-learn comes with the first estimator, torch with the first fit that needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from featpipe.heads.settings import parse_settings
from featpipe.heads.storage import TRUSTED, dumps, loads
from featpipe.heads.table import TABLE, TASKS, HeadSpec, Task, build, describe, names, settings_of, spec_of

if TYPE_CHECKING:
    from featpipe.heads.softmax import SoftmaxRegression
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
    "Task",
    "build",
    "describe",
    "dumps",
    "loads",
    "names",
    "parse_settings",
    "settings_of",
    "spec_of",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'featpipe.heads' has no attribute {name!r}")
    home = "softmax" if name == "SoftmaxRegression" else "torch_heads"
    return getattr(import_module(f"featpipe.heads.{home}"), name)
