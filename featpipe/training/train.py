"""The verb: fit one head on the embeddings of a cache, and say how good it is."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featpipe.cache import FeatureCache
from featpipe.config import unknown_name_error
from featpipe.diagnostics import Finding, LabeledPredictions, make_prediction_findings, write_findings
from featpipe.errors import ConfigError
from featpipe.heads import find_statistics_kind, fit_from_statistics
from featpipe.metrics import Calibration, compute_prior_offsets
from featpipe.model import (
    DEFAULT_RETENTION,
    STORED_DIGEST_BYTES,
    Model,
    ReplayMemory,
    RetentionPolicy,
    Uncertainty,
    collect_replay_memory,
)
from featpipe.runtime import ProgressCallback, ignore_progress
from featpipe.training.cross_validation import Estimate, cross_validate, fit_calibration_on_folds
from featpipe.training.dataset import EmbeddingDataset, load_training_data
from featpipe.training.fit import FittedHead, fit_head
from featpipe.training.head_config import HeadConfig
from featpipe.training.novelty import fit_novelty

__all__ = ["TrainedHead", "make_head_config", "parse_policy", "train", "train_head"]

logger = logging.getLogger(__name__)

CURVE_ATTRIBUTES = ("loss_curve_", "validation_curve_", "validation_score_curve_")


def train(
    cache: FeatureCache,
    head: str = "logistic",
    *,
    cv: int | None = None,
    params: Mapping[str, object] | None = None,
    output: str | None = None,
    tune: bool | None = None,
    grid: Mapping[str, Sequence[object]] | None = None,
    metric: str | None = None,
    one_standard_error: bool = False,
    balance: str | None = None,
    calibrate: bool = False,
    prior: Mapping[str, float] | None = None,
    groups: str | ArrayLike | None = None,
    times: str | ArrayLike | None = None,
    since: Any = None,
    without: str | os.PathLike[str] | None = None,
    memory: int | None = None,
    keep: str | None = None,
    jobs: int | None = None,
    random_state: int | None = 0,
    findings: str | os.PathLike[str] | None = None,
    progress: ProgressCallback = ignore_progress,
) -> Model:
    """Fit a head on the embeddings of a cache.

    Parameters
    ----------
    cache : FeatureCache
    head : str
        A name that ``featpipe heads`` lists, or the import path of a scikit-learn estimator.
    cv : int, optional
        Estimate the quality by so many folds of the training rows before fitting on all of them. Images with the same
        bytes never lie on both sides of a fold.
    params : mapping, optional
        Settings of the head, such as ``{"C": 10}``.
    output : str, optional
        Which of the cache's outputs; the first if not given.
    tune : bool, optional
        Choose settings on inner folds of the training rows. If not given, this is done for the strength ``C`` of
        ``logistic`` alone, along 45 values from 1e-6 to 1e5, unless ``params`` sets it.
    grid : mapping from setting to values, optional
        What to try, instead of the head's own grid.
    metric : str, optional
        The metric that settings are selected by, one of :data:`featpipe.metrics.SELECTION_METRICS`; the task's first if
        not given.
    one_standard_error : bool
        Choose the smallest ``C`` whose score is within one standard error of the best.
    balance : {"over", "under", "smote"}, optional
        Resample the training rows of each fit so that all classes are as frequent.
    calibrate : bool
        Fit a temperature on the predictions of the folds, so that probabilities mean what they say. Always done for
        heads that have scores and no probabilities.
    prior : mapping from class to share, optional
        How frequent classes are where the model will be used; probabilities are corrected for it.
    groups : str or array-like of shape (n,), optional
        For each sample of the cache what it belongs to (a patient, a photograph), which is never on both sides of a
        fold; ``TABLE:COLUMN`` reads it from a table.
    times : str or array-like of shape (n,), optional
        For each sample when it was made, likewise: folds are judged on what is later than what they were fitted on.
    since : str, number or date, optional
        With ``times``: estimate the quality once, by the images of that time or later, fitted on those before it; there
        are no folds then. The model is fitted on all of them at the end.
    without : path-like, optional
        A table of images to leave out, such as one of an evaluation's findings.
    memory : int, optional
        Bytes that training may use; features that need more are read from the file, pass after pass.
    keep : str, optional
        What the model keeps of a classifier's training data, so that it can learn more classes without it:
        ``none``, ``all``, or some of ``statistics``, ``importances`` and ``rows=N`` (embeddings of each class), with
        commas. If not given: statistics and importances; nothing where features stay in the file.
    jobs : int, optional
        Processes for ``tune``, as joblib counts them.
    random_state : int or None
    findings : path-like, optional
        A folder for tables of training images to look at: likely label errors, mistakes and doubts of the folds, each
        image judged by a head that was not fitted on it.
    progress : callable

    Returns
    -------
    Model
        ``model.scores`` holds the estimate, ``model.history`` what it was trained on, what was chosen, and the time.

    Raises
    ------
    ConfigError
        If head or setting is unknown, or a class has fewer images than there are folds.
    CacheError
        If the cache has no labels.

    Examples
    --------
    >>> model = train(FeatureCache("cache/photos.h5"), head="mlp", cv=5)        # doctest: +SKIP
    """
    if findings is not None and not cv:
        raise ConfigError("findings are of images that were held out; give cv, 2 or more folds")
    policy = parse_policy(keep)
    dataset = load_training_data(cache, output, groups=groups, times=times, since=since, without=without, memory=memory)
    config = make_head_config(
        cache,
        dataset,
        head,
        params or {},
        grid=grid or {},
        tune=tune,
        metric=metric,
        one_standard_error=one_standard_error,
        balance=balance,
        jobs=jobs,
        random_state=random_state,
    )
    trained_head = train_head(cache, dataset, config, cv, calibrate=calibrate, prior=prior, progress=progress)
    if findings is not None and trained_head.estimate is not None:
        write_findings(_find_suspects(dataset, trained_head.estimate), findings)
    return trained_head.to_model(cache, dataset, output, params or {}, policy)


def parse_policy(text: str | None) -> RetentionPolicy | None:
    """What to keep, as it is typed; None is what there is room for."""
    if text is None:
        return None
    policy = RetentionPolicy.from_text(text)
    policy.raise_if_network()
    return policy


def _find_suspects(dataset: EmbeddingDataset, estimate: Estimate) -> list[Finding]:
    """What the folds say of the rows that they were not fitted on."""
    held_out = dataset.take(estimate.held_out)
    return make_prediction_findings(
        LabeledPredictions(held_out.task, list(held_out.ids), held_out.y, estimate.predictions, held_out.classes)
    )


def make_head_config(
    cache: FeatureCache, dataset: EmbeddingDataset, head: str, params: Mapping[str, object], **options: Any
) -> HeadConfig:
    """The checked plan of one head."""
    settings = _encode_class_weights(params, dataset.classes) if cache.task == "classification" else dict(params)
    config = HeadConfig(head, cache.task, settings, **options)
    config.validate()
    return config


@dataclass(frozen=True, eq=False)
class TrainedHead:
    """A fitted head and what is known of its quality."""

    config: HeadConfig
    fitted: FittedHead
    estimate: Estimate | None
    calibration: Calibration | None
    trust: Uncertainty

    def to_model(
        self,
        cache: FeatureCache,
        dataset: EmbeddingDataset,
        output: str | None,
        params: Mapping[str, object],
        policy: RetentionPolicy | None = None,
    ) -> Model:
        """As it is saved and used; with the settings as they were given, weights of classes by name."""
        replay_memory = self._make_replay_memory(dataset, policy)
        scores = {} if self.estimate is None else {"cross_validation": self.estimate.to_dict()}
        return Model(
            head=self.fitted.estimator,
            head_name=self.config.head,
            task=cache.task,
            classes=dataset.classes,
            output=output or cache.outputs[0],
            facts=cache.facts,
            request=dict(cache.manifest["backbone"]),
            trained_on=_unique_digests(dataset.digests[:, :STORED_DIGEST_BYTES]),
            scores=_to_json(scores),
            history=_make_history(cache, dataset, self, params),
            calibration=self.calibration,
            kept=replay_memory,
            trust=self.trust,
        )

    def _make_replay_memory(self, dataset: EmbeddingDataset, policy: RetentionPolicy | None) -> ReplayMemory | None:
        """What is kept of the rows; a closed-form head is then what follows from its statistics, to the last digits."""
        if policy is None:
            policy = RetentionPolicy() if dataset.is_streamed else RetentionPolicy.from_text(DEFAULT_RETENTION)
        if self.config.task != "classification" or not policy:
            return None
        pipeline = self.fitted.estimator
        if dataset.is_streamed and policy != RetentionPolicy(statistics=True):
            raise ConfigError("keep: of features that stay in the file only statistics are kept; give more --memory")
        replay_memory = collect_replay_memory(policy, pipeline, dataset.X, dataset.y, len(dataset.classes))
        if replay_memory.statistics is not None and find_statistics_kind(pipeline)[1] and not self.config.balance:
            fit_from_statistics(pipeline, replay_memory.statistics)
        return replay_memory


def train_head(
    cache: FeatureCache,
    dataset: EmbeddingDataset,
    config: HeadConfig,
    cv: int | None,
    *,
    calibrate: bool = False,
    prior: Mapping[str, float] | None = None,
    progress: ProgressCallback = ignore_progress,
) -> TrainedHead:
    """Estimate, fit and calibrate."""
    location = f"{cache.path}: head {config.head!r}"
    if calibrate and config.task == "regression":
        raise ConfigError("calibrate is for probabilities; a regression has none")
    try:
        offsets = _compute_prior_offsets(dataset, config, prior) if prior else ()
        estimate = None
        if cv or dataset.since is not None:
            estimate = cross_validate(
                config, dataset, cv or 1, calibrate=calibrate, progress=progress, metric=config.metric
            )
        logger.info(f"fitting {config.head} on {len(dataset)} images")
        fitted = fit_head(config, dataset)
        if fitted.search_result is not None:
            search_result = fitted.search_result
            logger.info(f"{config.head}: {search_result}, by {search_result.metric}, {search_result.description}")
        calibration = estimate.calibration if estimate else None
        needs_calibration = config.task != "regression" and not fitted.has_probabilities
        if calibration is None and (calibrate or needs_calibration):
            calibration = fit_calibration_on_folds(config, dataset, progress)
    except ConfigError:
        raise
    except ValueError as error:  # how estimators refuse data, in scikit-learn's world
        dataset.check_finite()
        raise ConfigError(f"{location} cannot be fitted: {' '.join(str(error).split())}") from error
    if offsets:
        calibration = Calibration((calibration or Calibration()).temperature, offsets)
    # answers of the folds know nothing of another mix of classes
    conformal = estimate.conformal if estimate is not None and not offsets else None
    return TrainedHead(config, fitted, estimate, calibration, Uncertainty(fit_novelty(dataset, config.task), conformal))


def _compute_prior_offsets(
    dataset: EmbeddingDataset, config: HeadConfig, prior: Mapping[str, float]
) -> tuple[float, ...]:
    if config.task != "classification":
        raise ConfigError(f"prior is for classes that exclude each other, not for {config.task}")
    counts = np.bincount(dataset.y, minlength=len(dataset.classes))
    weightings = [config.params.get(name) for name in ("class_weight", "sampling", "logit_adjustment", "priors")]
    if config.balance or "balanced" in weightings:
        counts = np.ones_like(counts)
    elif any(weightings):
        raise ConfigError("prior takes rows as they are, or balanced: not with other weights, or logit_adjustment")
    return compute_prior_offsets(dict(zip(dataset.classes, counts.tolist(), strict=True)), prior, dataset.classes)


def _encode_class_weights(params: Mapping[str, object], classes: tuple[str, ...]) -> dict[str, object]:
    """The settings for a head that is fitted on class numbers: weights of classes are given by name."""
    encoded = dict(params)
    weights = params.get("class_weight")
    if isinstance(weights, Mapping):
        unknown_names = [name for name in weights if name not in classes]
        if unknown_names:
            raise unknown_name_error("class", str(unknown_names[0]), classes, "(in class_weight)")
        encoded["class_weight"] = {classes.index(name): weight for name, weight in weights.items()}
    return encoded


def _make_history(
    cache: FeatureCache, dataset: EmbeddingDataset, trained_head: TrainedHead, params: Mapping[str, object]
) -> dict[str, Any]:
    config, fitted = trained_head.config, trained_head.fitted
    unlabelled = int(np.count_nonzero(cache.ok)) - len(cache.usable)
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "trained_on": {
            "cache": cache.path.name,
            "fingerprint": cache.fingerprint,
            "rows": len(dataset),
            "of": len(cache),
            "split": "given" if cache.split.any() else "all labelled rows",
            "bad": cache.bad_rows(),
            "unlabelled": unlabelled,
        },
        "params": _to_json(params),
        "balance": config.balance,
        "chosen": None if fitted.search_result is None else _to_json(fitted.search_result.to_dict()),
        "streamed": dataset.is_streamed,
        "random_state": config.random_state,
        "seconds_to_fit": round(fitted.seconds_to_fit, 3),
        "seconds_to_tune": round(fitted.seconds_to_tune, 3),
        "curves": _get_curves(fitted.estimator),
        "versions": {name: version(name) for name in ("featpipe", "scikit-learn", "numpy")},
    }


def _unique_digests(digests: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The rows of (m, 16) bytes that differ, in order: `numpy.unique` of rows takes ten times as long."""
    words = np.ascontiguousarray(digests).view(">u8")
    first, second = (words[:, column].astype(np.uint64) for column in range(2))
    order = np.argsort(first)
    is_equal = np.diff(first[order]) == 0
    if is_equal.any():  # copies of an image, or two that begin alike
        tied_positions = np.flatnonzero(np.append(False, is_equal) | np.append(is_equal, False))
        tied = order[tied_positions]
        order[tied_positions] = tied[np.lexsort((second[tied], first[tied]))]
        order = order[np.append(True, ~(is_equal & (np.diff(second[order]) == 0)))]
    return np.column_stack([first[order], second[order]]).astype(">u8").view(np.uint8)


def _get_curves(estimator: Any) -> dict[str, Any]:
    """Losses by epoch, of heads that have epochs."""
    head = estimator[-1]
    curves = {name: getattr(head, name, None) for name in CURVE_ATTRIBUTES}
    return {name.rstrip("_"): _to_json(curve) for name, curve in curves.items() if curve}


def _to_json(value: object) -> Any:
    """A value as JSON can hold it; by its own words what JSON cannot hold."""
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_to_json(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return " ".join(repr(value).split())
