"""Several heads on the same folds: one table, and the best of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from featpipe import heads
from featpipe.cache import FeatureCache
from featpipe.errors import ConfigError
from featpipe.model import Model
from featpipe.runtime import ProgressCallback, ignore_progress
from featpipe.training.cross_validation import get_main_metric
from featpipe.training.dataset import EmbeddingDataset, load_training_data
from featpipe.training.train import TrainedHead, make_head_config, parse_policy, train_head

__all__ = ["HeadComparison", "HeadComparisonRow", "compare"]

logger = logging.getLogger(__name__)

N_TIMED_ROWS = 1000


@dataclass(frozen=True)
class HeadComparisonRow:
    """One head of a comparison.

    Attributes
    ----------
    head : str
    metric : str
    score, spread : float
        Cross-validated, and its standard deviation over the folds.
    scores : dict from metric to value
    seconds_to_fit : float
        On all training rows, the choice of settings included.
    seconds_to_predict : float
        For 1,000 rows.
    bytes : int
        Of the head as it is saved.
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
    rows : list of Compared
    model : Model
        Of the best head.
    how : str
        How the scores were measured.
    """

    rows: list[HeadComparisonRow]
    model: Model
    how: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"how": self.how, "heads": [dict(vars(row)) for row in self.rows]}


def compare(
    cache: FeatureCache,
    names: Sequence[str] | str = "all",
    *,
    cv: int = 5,
    params: Mapping[str, Mapping[str, object]] | None = None,
    output: str | None = None,
    metric: str | None = None,
    calibrate: bool = False,
    prior: Mapping[str, float] | None = None,
    memory: int | None = None,
    keep: str | None = None,
    groups: Any = None,
    times: Any = None,
    since: Any = None,
    without: Any = None,
    tune: bool | None = None,
    grid: Mapping[str, Sequence[object]] | None = None,
    balance: str | None = None,
    jobs: int | None = None,
    one_standard_error: bool = False,
    random_state: int | None = 0,
    progress: ProgressCallback = ignore_progress,
) -> HeadComparison:
    """Train several heads on one cache, and keep the best.

    Parameters
    ----------
    cache : FeatureCache
    names : sequence of str, or "all"
        The heads; all that do the cache's task.
    cv : int
        Folds, the same ones for all heads.
    params : mapping from head to settings, optional
    metric : str, optional
        What the best is chosen by; the first of the task if not given.
    output, calibrate, prior, memory, keep, groups, times, since, without, tune, grid, balance, jobs
        As for :func:`featpipe.training.train`.
    one_standard_error, random_state, progress
        As for :func:`featpipe.training.train`.

    Returns
    -------
    HeadComparison

    Raises
    ------
    ConfigError
        If a head is unknown or there are fewer than two folds: without an estimate there is nothing to compare.
    """
    if cv < 2 and since is None:
        raise ConfigError(f"cv is {cv}; heads are compared on 2 folds or more")
    policy = parse_policy(keep)
    dataset = load_training_data(cache, output, groups=groups, times=times, since=since, without=without, memory=memory)
    head_names = (
        heads.list_heads(cache.task) if names == "all" or list(names) == ["all"] else list(dict.fromkeys(names))
    )
    head_params = params or {}
    configs = [
        make_head_config(
            cache,
            dataset,
            name,
            head_params.get(name, {}),
            grid=grid or {},
            tune=tune,
            metric=metric,
            one_standard_error=one_standard_error,
            balance=balance,
            jobs=jobs,
            random_state=random_state,
        )
        for name in head_names
    ]
    results: list[tuple[HeadComparisonRow, TrainedHead]] = []
    for config in configs:
        logger.info(config.head if since is not None else f"{config.head}: {cv} folds")
        trained_head = train_head(cache, dataset, config, cv, calibrate=calibrate, prior=prior, progress=progress)
        results.append((_make_row(trained_head, dataset, metric), trained_head))
    results.sort(key=lambda pair: -_selection_score(pair[0], pair[1]))
    table, best_head = [row for row, _ in results], results[0][1]
    assert best_head.estimate is not None
    model = best_head.to_model(cache, dataset, output, head_params.get(best_head.config.head, {}), policy)
    comparison = HeadComparison(table, model, best_head.estimate.description)
    comparison.model.scores["comparison"] = comparison.to_dict()["heads"]
    return comparison


def _selection_score(row: HeadComparisonRow, trained_head: TrainedHead) -> float:
    assert trained_head.estimate is not None
    return get_main_metric(trained_head.estimate.scores, row.metric)[1]


def _make_row(trained_head: TrainedHead, dataset: EmbeddingDataset, metric: str | None) -> HeadComparisonRow:
    estimate, fitted = trained_head.estimate, trained_head.fitted
    assert estimate is not None
    name, _ = get_main_metric(estimate.scores, metric)
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
