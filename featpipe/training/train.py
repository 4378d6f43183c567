"""Train one head on the embeddings of a cache, and estimate its quality."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from featpipe.cache import FeatureCache
from featpipe.config import TrainingConfig, TrainingOptions, unknown_name_error
from featpipe.diagnostics import Finding, LabeledPredictions, make_prediction_findings, write_findings
from featpipe.errors import ConfigError, ModelError
from featpipe.heads import find_statistics_kind, fit_from_statistics
from featpipe.metrics import Calibration, compute_prior_offsets, format_protocol
from featpipe.model import (
    DEFAULT_RETENTION,
    STORED_DIGEST_BYTES,
    Model,
    ReplayMemory,
    RetentionPolicy,
    Uncertainty,
    collect_replay_memory,
    load_model,
)
from featpipe.runtime import ProgressCallback, ignore_progress
from featpipe.storage import Receipt, compute_fingerprint, make_writable_folder
from featpipe.training.cross_validation import Estimate, cross_validate, fit_calibration_on_folds
from featpipe.training.dataset import EmbeddingDataset, load_training_data
from featpipe.training.fit import FittedHead, fit_head
from featpipe.training.head_config import HeadConfig
from featpipe.training.novelty import fit_novelty

logger = logging.getLogger(__name__)

CURVE_ATTRIBUTES = ("loss_curve_", "validation_curve_", "validation_score_curve_")


def train(
    cache: FeatureCache | str | os.PathLike[str],
    head: str = "logistic",
    *,
    progress: ProgressCallback = ignore_progress,
    **settings: Unpack[TrainingOptions],
) -> Model:
    """Train a head on the embeddings of a cache.

    Parameters
    ----------
    cache : FeatureCache or path of one
    head : str
        A name listed by ``featpipe heads``, or the import path of a scikit-learn estimator.
    progress : callable
    **settings
        The other fields of :class:`featpipe.config.TrainingConfig`: ``cv``, ``params``, ``output``, ``tune``, ``grid``,
        ``metric``, ``one_standard_error``, ``balance``, ``calibrate``, ``prior``, ``groups``, ``times``, ``since``,
        ``without``, ``memory``, ``keep``, ``jobs``, ``random_state``, ``findings``.

    Returns
    -------
    Model
        ``model.scores`` holds the estimate, ``model.history`` the training rows, the chosen settings and the time.

    Raises
    ------
    ConfigError
        If the head or a setting is unknown, or a class has fewer images than there are folds.
    CacheError
        If the cache has no labels.

    Examples
    --------
    >>> model = train(FeatureCache("cache/photos.h5"), head="mlp", cv=5)        # doctest: +SKIP
    """
    cache = cache if isinstance(cache, FeatureCache) else FeatureCache(cache)
    return train_or_load(cache, TrainingConfig.from_settings({"head": head, **settings}), None, progress)


def train_or_load(
    cache: FeatureCache,
    config: TrainingConfig,
    path: str | os.PathLike[str] | None,
    progress: ProgressCallback = ignore_progress,
) -> Model:
    """Load the model at a path if the same request made it; train a head otherwise. See :func:`train`.

    Findings are never reused: a request for them trains.
    """
    if config.findings is not None and not config.cv:
        raise ConfigError("findings are made from predictions on held-out images; give cv, 2 or more folds")
    if config.findings is not None:
        make_writable_folder(Path(config.findings), ConfigError, "findings")
    policy = parse_policy(config.keep)
    dataset = load_training_rows(cache, config)
    request = digest_request(cache, dataset, config)
    if path is not None and config.findings is None and (finished := load_finished(path, request)) is not None:
        return finished
    trained_head = train_head(cache, dataset, config, make_head_config(config, dataset), progress)
    if config.findings is not None and trained_head.estimate is not None:
        write_findings(_find_suspects(dataset, trained_head.estimate), config.findings)
    return trained_head.to_model(cache, dataset, policy, request)


VERSIONED_PACKAGES = ("featpipe", "numpy", "scipy", "scikit-learn", "torch", "torchvision", "timm")


def get_package_versions() -> dict[str, str]:
    """Versions of the packages that affect the results."""
    return {name: version(name) for name in VERSIONED_PACKAGES}


def digest_request(cache: FeatureCache, dataset: EmbeddingDataset, config: TrainingConfig, *heads: str) -> str:
    """Digest of all that determines a model: embeddings, rows, labels, settings, compared heads, and versions."""
    settings = asdict(config)
    for name in (
        "groups",
        "times",
        "without",
        "since",
        "memory",
        "jobs",
        "findings",
    ):  # reflected in the rows, or without effect on the model
        del settings[name]
    rows = [dataset.compute_digest(), dataset.is_streamed, str(dataset.since)]
    return compute_fingerprint([cache.fingerprint, rows, _to_json(settings), list(heads), get_package_versions()])


def load_finished(path: str | os.PathLike[str], request: str) -> Model | None:
    """The model at a path if this request made it, and neither `expand` nor `finetune` changed it since."""
    if not Path(path).is_file():
        return None
    try:
        model = load_model(path)
    except ModelError:
        return None
    was_changed = not model.history.keys().isdisjoint({"expansions", "finetuning"})
    if was_changed or not Receipt(model.history.get("request", "")).is_current(request):
        return None
    logger.info(f"{path}: up to date, nothing to do")
    return model


def load_training_rows(cache: FeatureCache, config: TrainingConfig) -> EmbeddingDataset:
    """Load the rows that the settings select."""
    names = ("groups", "times", "since", "without", "memory")
    return load_training_data(cache, config.output, **{name: getattr(config, name) for name in names})


def parse_policy(text: str | None) -> RetentionPolicy | None:
    """Parse the value of ``keep``; None selects the default policy for the size of the data."""
    if text is None:
        return None
    policy = RetentionPolicy.from_text(text)
    policy.raise_if_network()
    return policy


def _find_suspects(dataset: EmbeddingDataset, estimate: Estimate) -> list[Finding]:
    """Findings from the predictions of the folds on their held-out rows."""
    held_out = dataset.take(estimate.held_out)
    return make_prediction_findings(
        LabeledPredictions(held_out.task, list(held_out.ids), held_out.y, estimate.predictions, held_out.classes)
    )


def make_head_config(config: TrainingConfig, dataset: EmbeddingDataset) -> HeadConfig:
    """Make the settings of a head for a dataset, and validate them before any fit.

    Raises
    ------
    ConfigError
    """
    params = dict(config.params or {})
    head_config = HeadConfig(
        config.head,
        dataset.task,
        _encode_class_weights(params, dataset.classes) if dataset.task == "classification" else params,
        grid=config.grid or {},
        tune=config.tune,
        metric=config.metric,
        one_standard_error=config.one_standard_error,
        balance=config.balance,
        random_state=config.random_state,
        jobs=config.jobs,
    )
    head_config.validate()
    return head_config


def get_head_params(model: Model, *, with_chosen: bool = True) -> dict[str, Any]:
    """The settings of a model's head from its history; with those that a search chose, if there was one."""
    params = dict(model.history.get("params") or {})
    if with_chosen:
        params |= (model.history.get("chosen") or {}).get("settings", {})
    return {name: tuple(value) if isinstance(value, list) else value for name, value in params.items()}


@dataclass(frozen=True, eq=False)
class TrainedHead:
    """A fitted head and the estimate of its quality.

    Attributes
    ----------
    settings : TrainingConfig
    config : HeadConfig
    fitted : FittedHead
    estimate : Estimate or None
        None without cross-validation.
    calibration : Calibration or None
    trust : Uncertainty
    """

    settings: TrainingConfig
    config: HeadConfig
    fitted: FittedHead
    estimate: Estimate | None
    calibration: Calibration | None
    trust: Uncertainty

    def to_model(
        self, cache: FeatureCache, dataset: EmbeddingDataset, policy: RetentionPolicy | None = None, request: str = ""
    ) -> Model:
        """Make the model; its history stores the digest of the request, and the head's settings as given."""
        replay_memory = self._make_replay_memory(dataset, policy)
        scores = {} if self.estimate is None else {"cross_validation": self.estimate.to_dict()}
        return Model(
            head=self.fitted.estimator,
            head_name=self.config.head,
            task=cache.task,
            classes=dataset.classes,
            output=self.settings.output or cache.outputs[0],
            facts=cache.facts,
            request=dict(cache.manifest["backbone"]),
            trained_on=_find_distinct_digests(dataset.digests[:, :STORED_DIGEST_BYTES]),
            scores=_to_json(scores),
            history=_make_history(cache, dataset, self) | ({"request": request} if request else {}),
            calibration=self.calibration,
            kept=replay_memory,
            trust=self.trust,
        )

    def _make_replay_memory(self, dataset: EmbeddingDataset, policy: RetentionPolicy | None) -> ReplayMemory | None:
        """Collect the retained data; a closed-form head is refitted from its statistics, so that both agree exactly."""
        if policy is None:
            policy = RetentionPolicy() if dataset.is_streamed else RetentionPolicy.from_text(DEFAULT_RETENTION)
        if self.config.task != "classification" or not policy:
            return None
        pipeline = self.fitted.estimator
        if dataset.is_streamed and policy != RetentionPolicy(statistics=True):
            raise ConfigError(
                "keep: only statistics of features that stay in the file can be retained; give --keep statistics, or "
                "more --memory"
            )
        replay_memory = collect_replay_memory(policy, pipeline, dataset.X, dataset.y, len(dataset.classes))
        if replay_memory.statistics is not None and find_statistics_kind(pipeline)[1] and not self.config.balance:
            fit_from_statistics(pipeline, replay_memory.statistics)
        return replay_memory


def train_head(
    cache: FeatureCache,
    dataset: EmbeddingDataset,
    settings: TrainingConfig,
    config: HeadConfig,
    progress: ProgressCallback = ignore_progress,
) -> TrainedHead:
    """Estimate the quality of a head, fit it on all rows, and calibrate it."""
    location = f"{cache.path}: head {config.head!r}"
    if settings.calibrate and config.task == "regression":
        raise ConfigError("calibrate is for probabilities, which a regression does not have; leave it out")
    try:
        offsets = _compute_prior_offsets(dataset, config, settings.prior) if settings.prior else ()
        estimate = None
        if settings.cv or dataset.since is not None:
            estimate = cross_validate(
                config,
                dataset,
                settings.cv or 1,
                calibrate=settings.calibrate,
                progress=progress,
                metric=config.metric,
            )
        logger.info(f"fitting {config.head} on {len(dataset)} images")
        fitted = fit_head(config, dataset)
        if fitted.search_result is not None:
            result = fitted.search_result
            logger.info(f"{config.head}: {result}, by {result.metric}, {format_protocol(result.protocol)}")
        calibration = estimate.calibration if estimate else None
        needs_calibration = config.task != "regression" and not fitted.has_probabilities
        if calibration is None and (settings.calibrate or needs_calibration):
            calibration = fit_calibration_on_folds(config, dataset, progress)
    except ConfigError:
        raise
    except ValueError as error:  # scikit-learn's estimators raise it for data that they refuse
        dataset.check_finite()
        raise ConfigError(f"{location} cannot be fitted: {' '.join(str(error).split())}") from error
    if offsets:
        calibration = Calibration((calibration or Calibration()).temperature, offsets)
    # The folds' predictions are not calibrated for other class frequencies.
    conformal = estimate.conformal if estimate is not None and not offsets else None
    uncertainty = Uncertainty(fit_novelty(dataset, config.task), conformal)
    return TrainedHead(settings, config, fitted, estimate, calibration, uncertainty)


def _compute_prior_offsets(
    dataset: EmbeddingDataset, config: HeadConfig, prior: Mapping[str, float]
) -> tuple[float, ...]:
    if config.task != "classification":
        raise ConfigError(f"prior is for single-label classification, not for {config.task}")
    counts = np.bincount(dataset.y, minlength=len(dataset.classes))
    weightings = [config.params.get(name) for name in ("class_weight", "sampling", "logit_adjustment", "priors")]
    if config.balance or "balanced" in weightings:
        counts = np.ones_like(counts)
    elif any(weightings):
        raise ConfigError(
            "prior needs unweighted or balanced classes; leave out class_weight, sampling, priors and "
            "logit_adjustment, or set class_weight=balanced"
        )
    return compute_prior_offsets(dict(zip(dataset.classes, counts.tolist(), strict=True)), prior, dataset.classes)


def _encode_class_weights(params: Mapping[str, object], classes: tuple[str, ...]) -> dict[str, object]:
    """Replace class names in ``class_weight`` by class codes, which the head is fitted on."""
    encoded = dict(params)
    weights = params.get("class_weight")
    if isinstance(weights, Mapping):
        unknown_names = [name for name in weights if name not in classes]
        if unknown_names:
            raise unknown_name_error("class", str(unknown_names[0]), classes, "(in class_weight)")
        encoded["class_weight"] = {classes.index(name): weight for name, weight in weights.items()}
    return encoded


def _make_history(cache: FeatureCache, dataset: EmbeddingDataset, trained_head: TrainedHead) -> dict[str, Any]:
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
        "params": _to_json(trained_head.settings.params or {}),
        "balance": config.balance,
        "chosen": None if fitted.search_result is None else _to_json(fitted.search_result.to_dict()),
        "streamed": dataset.is_streamed,
        "random_state": config.random_state,
        "seconds_to_fit": round(fitted.seconds_to_fit, 3),
        "seconds_to_tune": round(fitted.seconds_to_tune, 3),
        "curves": _get_curves(fitted.estimator),
        "versions": {name: version(name) for name in ("featpipe", "scikit-learn", "numpy")},
    }


def _find_distinct_digests(digests: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The distinct rows of an (m, 16) array of bytes, sorted; `numpy.unique` on rows takes ten times as long."""
    words = np.ascontiguousarray(digests).view(">u8")
    first, second = (words[:, column].astype(np.uint64) for column in range(2))
    order = np.argsort(first)
    is_equal = np.diff(first[order]) == 0
    if is_equal.any():  # copies of an image, or digests with the same first 8 bytes
        tied_positions = np.flatnonzero(np.append(False, is_equal) | np.append(is_equal, False))
        tied = order[tied_positions]
        order[tied_positions] = tied[np.lexsort((second[tied], first[tied]))]
        order = order[np.append(True, ~(is_equal & (np.diff(second[order]) == 0)))]
    return np.column_stack([first[order], second[order]]).astype(">u8").view(np.uint8)


def _get_curves(estimator: Any) -> dict[str, Any]:
    """Loss and score curves by epoch, of heads that have epochs."""
    head = estimator[-1]
    curves = {name: getattr(head, name, None) for name in CURVE_ATTRIBUTES}
    return {name.rstrip("_"): _to_json(curve) for name, curve in curves.items() if curve}


def _to_json(value: object) -> Any:
    """Convert a value to JSON types; values of other types become their ``repr``."""
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_to_json(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return " ".join(repr(value).split())
