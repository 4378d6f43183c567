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
    from featpipe.evaluation.evaluate import evaluate
    from featpipe.experiments.runner import run
    from featpipe.extraction.extract import extract
    from featpipe.finetuning.finetune import finetune
    from featpipe.heads import SoftmaxRegression, SoftmaxRegressionCV
    from featpipe.incremental.expand import expand
    from featpipe.maintenance.clean import clean
    from featpipe.maintenance.merge import merge
    from featpipe.maintenance.pack import pack
    from featpipe.maintenance.verify import repair, verify
    from featpipe.model import Model, load_model
    from featpipe.prediction.predict import predict
    from featpipe.training.compare import compare
    from featpipe.training.train import train

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
    "clean": "maintenance",
    "compare": "training",
    "evaluate": "evaluation",
    "expand": "incremental",
    "extract": "extraction",
    "finetune": "finetuning",
    "load_model": "model",
    "merge": "maintenance",
    "pack": "maintenance",
    "predict": "prediction",
    "repair": "maintenance",
    "run": "experiments",
    "train": "training",
    "verify": "maintenance",
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
