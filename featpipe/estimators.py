"""scikit-learn estimators on images, with cached embeddings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, TransformerMixin
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

from featpipe import heads
from featpipe.backbones import Backbone, resolve_outputs
from featpipe.config import ExtractionConfig, Precision
from featpipe.data import get_modality
from featpipe.errors import ConfigError
from featpipe.extraction import embed_files, load_backbone
from featpipe.inference import Engine, SampleList, resolve_device
from featpipe.model import embed_samples_or_raise, raise_for_failures


@dataclass(kw_only=True, eq=False, repr=False)
class _EmbeddingEstimator(BaseEstimator):
    """Base of the three estimators: images → embeddings."""

    backbone: Any = field(default="efficientnet_lite0", kw_only=False)
    weights: str | os.PathLike[str] | None = None
    output: str = "pooled"
    device: str = "auto"
    precision: Precision = "fp32"
    cache: str | os.PathLike[str] | None = "cache"
    seed: int = 0

    def _embed(self, X: Any) -> NDArray[np.float32]:
        config = self._make_config()
        backbone = _resolve_backbone(config)
        image_list = get_modality(backbone.modality).to_list(X)
        if self.cache is None or not all(isinstance(image, (str, os.PathLike)) for image in image_list):
            engine = _make_engine(backbone, config.device, config.precision)
            return embed_samples_or_raise(SampleList(image_list, backbone.modality), engine, config.outputs[0])
        features, status = embed_files(image_list, backbone, config)
        raise_for_failures(image_list, status)
        return np.asarray(features, np.float32)

    def _make_config(self) -> ExtractionConfig:
        return ExtractionConfig(
            backbone=self.backbone,
            weights=self.weights,
            outputs=(self.output,),
            device=self.device,
            precision=self.precision,
            cache="cache" if self.cache is None else self.cache,
            seed=self.seed,
        )

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        tags.no_validation = True
        return tags


class FeatureExtractor(TransformerMixin, _EmbeddingEstimator):
    """Images → embeddings, as a scikit-learn transformer.

    Parameters
    ----------
    backbone : str or Backbone
        A name that ``featpipe backbones`` lists, ``package.module:factory``, or a result of
        ``featpipe.backbones.load``.
    weights : str or path-like, optional
        A published name, a file, or ``"none"``.
    output : str
        ``pooled``, or ``NODE[:POOL]``.
    device : str
    precision : {"fp32", "tf32", "bf16", "fp16"}
    cache : path-like or None
        The folder of the caches of files' embeddings; None disables caching.
    seed : int
        For random weights.

    Examples
    --------
    >>> pipe = make_pipeline(FeatureExtractor("resnet18"), LogisticRegression())   # doctest: +SKIP
    >>> pipe.fit(paths, y)                                                         # doctest: +SKIP
    """

    def fit(self, X: Any, y: Any = None) -> FeatureExtractor:
        """Load the backbone, so that a wrong name fails early; nothing is fitted."""
        self.n_features_out_ = int(np.prod(next(iter(_resolve_backbone(self._make_config()).shapes.values()))))
        return self

    def transform(self, X: Any) -> NDArray[np.float32]:
        """Embeddings of shape (n, d) of n paths, bytes, Pillow images or uint8 arrays.

        Raises
        ------
        SampleError
            If an image cannot be read; none is replaced or dropped.
        """
        check_is_fitted(self, "n_features_out_")
        features = self._embed(X)
        return features.reshape(len(features), -1)

    def get_feature_names_out(self, input_features: ArrayLike | None = None) -> NDArray[np.object_]:
        check_is_fitted(self, "n_features_out_")
        return np.array([f"{self.output}{i}" for i in range(self.n_features_out_)], dtype=object)


@dataclass(kw_only=True, eq=False, repr=False)
class _TransferEstimator(_EmbeddingEstimator):
    """Base of classifier and regressor: a head on embeddings."""

    head: str = field(default="logistic", kw_only=False)
    head_params: Mapping[str, object] | None = None
    random_state: int | None = 0
    _task: ClassVar[str]

    def _fit(self, X: Any, y: NDArray[Any]) -> None:
        estimator = heads.build(self.head, self._task, params=self.head_params, random_state=self.random_state)
        image_list = get_modality(_resolve_backbone(self._make_config()).modality).to_list(X)
        if y.ndim == 0 or len(y) != len(image_list):
            raise ValueError(
                f"X has {len(image_list)} images, y has shape {y.shape}; give one label or target for each image"
            )
        features = self._embed(image_list)
        if features.ndim != 2:
            raise ConfigError(
                f"output {self.output!r} gives feature maps of shape {features.shape[1:]}; heads train on pooled "
                f"outputs: {self.output.partition(':')[0]}:avg"
            )
        self.head_ = estimator.fit(features, y)

    def predict(self, X: Any) -> NDArray[Any]:
        """Predictions of shape (n,) for n paths, bytes, Pillow images or uint8 arrays."""
        check_is_fitted(self, "head_")
        return np.asarray(self.head_.predict(self._embed(X)))


def _available_if_head_has(method: str) -> Any:
    """Whether the head, fitted or not, has a method; svm and ridge have no probabilities."""

    def has_method(self: _TransferEstimator) -> bool:
        return hasattr(getattr(self, "head_", None) or heads.build(self.head, self._task), method)

    return available_if(has_method)


class TransferClassifier(ClassifierMixin, _TransferEstimator):
    """A frozen backbone and a head, as a scikit-learn classifier on images.

    Parameters
    ----------
    backbone : str or Backbone
    head : str
        A name that ``featpipe heads`` lists, or the import path of an estimator. ``logistic`` uses the strength
        ``C`` of its settings; ``featpipe.SoftmaxRegressionCV`` chooses one.
    head_params : mapping, optional
        Settings of the head, such as ``{"C": 10}``.
    weights, output, device, precision, cache, seed
        As in :class:`FeatureExtractor`.
    random_state : int or None

    Attributes
    ----------
    classes_ : ndarray of shape (k,)
    head_ : estimator
        The fitted head, on embeddings.

    Examples
    --------
    >>> clf = TransferClassifier(head="mlp").fit(paths, y)                  # doctest: +SKIP
    >>> clf.predict(["a.jpg"])                                              # doctest: +SKIP
    """

    _task = "classification"

    def fit(self, X: Any, y: ArrayLike) -> TransferClassifier:
        """Embed n images, or read their embeddings from the cache, and fit the head."""
        y = np.asarray(y)
        check_classification_targets(y)
        self._fit(X, y)
        self.classes_ = self.head_.classes_
        return self

    @_available_if_head_has("predict_proba")
    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Probabilities of shape (n, k), columns in the order of ``classes_``."""
        check_is_fitted(self, "head_")
        return np.asarray(self.head_.predict_proba(self._embed(X)))

    @_available_if_head_has("decision_function")
    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Scores of shape (n, k), or (n,) for two classes."""
        check_is_fitted(self, "head_")
        return np.asarray(self.head_.decision_function(self._embed(X)))


@dataclass(kw_only=True, eq=False, repr=False)
class TransferRegressor(RegressorMixin, _TransferEstimator):
    """A frozen backbone and a head, as a scikit-learn regressor on images; parameters as in the classifier."""

    head: str = field(default="linear", kw_only=False)
    _task = "regression"

    def fit(self, X: Any, y: ArrayLike) -> TransferRegressor:
        """Embed n images, or read their embeddings from the cache, and fit the head."""
        self._fit(X, np.asarray(y, np.float64))
        return self


def _resolve_backbone(config: ExtractionConfig) -> Backbone:
    """The backbone with the one output that the config names."""
    if isinstance(config.backbone, Backbone):
        return _select_output(config.backbone, config.outputs[0])
    if not isinstance(config.backbone, str):
        raise ConfigError(
            f"backbone is a {type(config.backbone).__name__}; give a name, or "
            "featpipe.backbones.load(network, transform=…)"
        )
    weights = None if config.weights is None else os.fspath(config.weights)
    return _load_cached_backbone(config.backbone, weights, tuple(config.outputs), config.seed, _get_file_stamp(weights))


# A grid search clones and fits many times; these caches read the network and move it to the device once.


@lru_cache(maxsize=2)
def _load_cached_backbone(
    name: str, weights: str | None, outputs: tuple[str, ...], seed: int, stamp: tuple[int, int] | None
) -> Backbone:
    return load_backbone(ExtractionConfig(backbone=name, weights=weights, outputs=outputs, seed=seed))


@lru_cache(maxsize=2)
def _select_output(backbone: Backbone, output: str) -> Backbone:
    if backbone.outputs[0].name == output and len(backbone.outputs) == 1:
        return backbone
    network = deepcopy(backbone.network)  # because the hooks of an output stay on its network
    outputs = resolve_outputs(network, (output,), backbone.transform)
    return replace(backbone, network=network, outputs=outputs, request={**backbone.request, "outputs": [output]})


@lru_cache(maxsize=2)
def _make_engine(backbone: Backbone, device: str, precision: str) -> Engine:
    return Engine(backbone, resolve_device(device), precision)


def _get_file_stamp(weights: str | None) -> tuple[int, int] | None:
    try:
        file_stat = os.stat(weights or "")
    except OSError:
        return None
    return file_stat.st_size, file_stat.st_mtime_ns
