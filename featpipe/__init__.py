"""featpipe: transfer learning on images.

A frozen backbone runs once over the images and its embeddings are cached; heads train on the cache in seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from featpipe.runtime import lazy_imports

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
    from featpipe.experiments import run
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
else:
    __getattr__, __dir__ = lazy_imports(__name__)  # so that reading a cache imports no torch

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
