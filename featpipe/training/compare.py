"""Compare several heads on the same folds, and select the best."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Unpack

import numpy as np

from featpipe import heads
from featpipe.cache import FeatureCache
from featpipe.config import ComparisonOptions, TrainingConfig, check_names
from featpipe.errors import ConfigError
from featpipe.metrics import METRICS, format_protocol
from featpipe.model import Model
from featpipe.runtime import ProgressCallback, ignore_progress
from featpipe.training.cross_validation import get_main_metric
from featpipe.training.dataset import EmbeddingDataset
from featpipe.training.train import (
    TrainedHead,
    digest_request,
    load_finished,
    load_training_rows,
    make_head_config,
    parse_policy,
    train_head,
)

logger = logging.getLogger(__name__)

DEFAULT_FOLDS = 5
N_TIMED_ROWS = 1000


@dataclass(frozen=True)
class HeadComparisonRow:
    """One head of a comparison.

    Attributes
    ----------
    head : str
    metric : str
    score, spread : float
        The cross-validated score, and its standard deviation over the folds.
    scores : dict from metric to value
    seconds_to_fit : float
        On all training rows, including the search for settings.
    seconds_to_predict : float
        For 1,000 rows.
    bytes : int
        The size of the saved head.
    chosen : dict
        The settings that were tuned.
    """

    head: str
    metric: str
    score: float
    spread: float
    scores: dict[str, float]
    seconds_to_fit: float
    seconds_to_predict: float
    bytes: int
    chosen: dict[str, Any]


@dataclass(frozen=True, eq=False)
class HeadComparison:
    """Several heads on the same folds, the best first.

    Attributes
    ----------
    rows : list of HeadComparisonRow
        Sorted by score, the best first.
    model : Model
        The model of the best head.
    protocol : dict
        How the scores were measured, see :func:`featpipe.metrics.format_protocol`.
    """

    rows: list[HeadComparisonRow]
    model: Model
    protocol: dict[str, Any]

    @property
    def how(self) -> str:
        """A description of how the scores were measured."""
        return format_protocol(self.protocol)

    def to_dict(self) -> dict[str, Any]:
        return {"how": self.protocol, "heads": [dict(vars(row)) for row in self.rows]}


def compare(
    cache: FeatureCache | str | os.PathLike[str],
    names: Sequence[str] | str = "all",
    *,
    params: Mapping[str, Mapping[str, object]] | None = None,
    progress: ProgressCallback = ignore_progress,
    **settings: Unpack[ComparisonOptions],
) -> HeadComparison:
    """Train several heads on one cache, and select the best.

    Parameters
    ----------
    cache : FeatureCache or path of one
    names : sequence of str, or "all"
        The heads; ``all`` selects every head for the cache's task.
    params : mapping from head to settings, optional
    progress : callable
    **settings
        Fields of :class:`featpipe.config.TrainingConfig`: ``cv`` (5 if not given; the same folds for all heads),
        ``output``, ``tune``, ``grid``, ``metric`` (which also selects the best head), ``one_standard_error``,
        ``balance``, ``calibrate``, ``prior``, ``groups``, ``times``, ``since``, ``without``, ``memory``, ``keep``,
        ``jobs``, ``random_state``.

    Returns
    -------
    HeadComparison

    Raises
    ------
    ConfigError
        If a head is unknown, or there are fewer than two folds: the comparison needs an estimate.
    """
    check_names("setting", settings, ComparisonOptions.__annotations__)
    cache = cache if isinstance(cache, FeatureCache) else FeatureCache(cache)
    return compare_or_load(
        cache, names, TrainingConfig.from_settings({"cv": DEFAULT_FOLDS, **settings}), None, params, progress
    )


def compare_or_load(
    cache: FeatureCache,
    names: Sequence[str] | str,
    config: TrainingConfig,
    make_path: Callable[[str], str | os.PathLike[str]] | None,
    params: Mapping[str, Mapping[str, object]] | None = None,
    progress: ProgressCallback = ignore_progress,
) -> HeadComparison:
    """Load a comparison that the same request made; compare otherwise. See :func:`compare`.

    Parameters
    ----------
    cache : FeatureCache
    names : sequence of str, or "all"
    config : TrainingConfig
    make_path : callable, optional
        The path of the model of a head, if that head is the best.
    params : mapping from head to settings, optional
    progress : callable
    """
    if (config.cv or 0) < 2 and config.since is None:
        raise ConfigError(f"cv is {config.cv}; give 2 folds or more to compare heads")
    policy = parse_policy(config.keep)
    dataset = load_training_rows(cache, config)
    head_names = (
        heads.list_heads(cache.task) if names == "all" or list(names) == ["all"] else list(dict.fromkeys(names))
    )
    request = digest_request(cache, dataset, config, *head_names, *([str(params)] if params else []))
    for path in dict.fromkeys(map(make_path, head_names)) if make_path is not None else ():
        if (model := load_finished(path, request)) is not None:
            rows = [HeadComparisonRow(**row) for row in model.scores["comparison"]]
            return HeadComparison(rows, model, model.scores["cross_validation"]["how"])
    configs = [replace(config, head=name, params=(params or {}).get(name)) for name in head_names]
    head_configs = [make_head_config(config, dataset) for config in configs]
    results: list[tuple[HeadComparisonRow, TrainedHead]] = []
    for config, head_config in zip(configs, head_configs, strict=True):
        logger.info(config.head if config.since is not None else f"{config.head}: {config.cv} folds")
        trained_head = train_head(cache, dataset, config, head_config, progress)
        results.append((_make_row(trained_head, dataset, config.metric), trained_head))
    results.sort(key=lambda pair: -METRICS[pair[0].metric].gain(pair[0].score))
    table, best_head = [row for row, _ in results], results[0][1]
    assert best_head.estimate is not None
    best_model = best_head.to_model(cache, dataset, policy, request)
    comparison = HeadComparison(table, best_model, best_head.estimate.protocol)
    comparison.model.scores["comparison"] = comparison.to_dict()["heads"]
    return comparison


def _make_row(trained_head: TrainedHead, dataset: EmbeddingDataset, metric: str | None) -> HeadComparisonRow:
    estimate, fitted = trained_head.estimate, trained_head.fitted
    assert estimate is not None
    name = get_main_metric(estimate.scores, metric)
    sample = np.asarray(dataset.X[: min(len(dataset), N_TIMED_ROWS)], np.float32)
    batch = np.resize(sample, (N_TIMED_ROWS, sample.shape[1]))
    start_time = perf_counter()
    fitted.estimator.predict(batch)
    seconds = perf_counter() - start_time
    return HeadComparisonRow(
        head=trained_head.config.head,
        metric=name,
        score=estimate.scores.metrics[name].value,
        spread=estimate.spread,
        scores={key: interval.value for key, interval in estimate.scores.metrics.items()},
        seconds_to_fit=fitted.seconds_to_fit + fitted.seconds_to_tune,
        seconds_to_predict=seconds,
        bytes=len(heads.dumps(fitted.estimator)),
        chosen={} if fitted.search_result is None else dict(fitted.search_result.settings),
    )
