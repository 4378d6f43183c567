"""featpipe: transfer learning on images.

A frozen backbone runs once over the images and its embeddings are cached; heads train on the cache in seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featpipe.cache import FeatureCache
    from featpipe.errors import (
        ArchiveError,
        CacheError,
        CacheFormatError,
        CacheIncompleteError,
        CacheMismatchError,
        ConfigError,
        FeatpipeError,
        ModelError,
        SampleError,
        TimeLimitError,
        WeightsError,
    )
    from featpipe.estimators import FeatureExtractor, TransferClassifier, TransferRegressor
    from featpipe.evaluation import evaluate
    from featpipe.experiments import run
    from featpipe.extraction import extract
    from featpipe.finetuning import finetune
    from featpipe.heads import SoftmaxRegression, SoftmaxRegressionCV
    from featpipe.incremental import expand
    from featpipe.maintenance import clean, merge, pack, repair, verify
    from featpipe.model import Model, load_model
    from featpipe.prediction import predict
    from featpipe.training import compare, train

__all__ = [
    "ArchiveError",
    "CacheError",
    "CacheFormatError",
    "CacheIncompleteError",
    "CacheMismatchError",
    "ConfigError",
    "FeatpipeError",
    "FeatureCache",
    "FeatureExtractor",
    "Model",
    "ModelError",
    "SampleError",
    "SoftmaxRegression",
    "SoftmaxRegressionCV",
    "TimeLimitError",
    "TransferClassifier",
    "TransferRegressor",
    "WeightsError",
    "clean",
    "compare",
    "evaluate",
    "expand",
    "extract",
    "finetune",
    "load_model",
    "merge",
    "pack",
    "predict",
    "repair",
    "run",
    "train",
    "verify",
]

__version__ = "0.1.0"

_HOMES = {  # loaded when first used, so that reading a cache costs no torch
    "FeatureCache": "cache",
    "FeatureExtractor": "estimators",
    "Model": "model",
    "SoftmaxRegression": "heads",
    "SoftmaxRegressionCV": "heads",
    "TransferClassifier": "estimators",
    "TransferRegressor": "estimators",
    "clean": "upkeep",
    "compare": "training",
    "evaluate": "evaluation",
    "expand": "expansion",
    "extract": "extraction",
    "finetune": "finetuning",
    "load_model": "model",
    "merge": "upkeep",
    "pack": "upkeep",
    "predict": "prediction",
    "repair": "verification",
    "run": "pipeline",
    "train": "training",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        module = importlib.import_module(f"featpipe.{_HOMES.get(name, 'errors')}")
        value = getattr(module, name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'featpipe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
