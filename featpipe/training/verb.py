"""The verb: fit one head on the embeddings of a cache, and say how good it is."""

from __future__ import annotations

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
from featpipe.calibration import Calibration, prior_offsets
from featpipe.errors import ConfigError
from featpipe.findings import Finding, Judged, suspects, write_findings
from featpipe.heads.statistics import fit_from_statistics, kind_for
from featpipe.kept import DEFAULT, Keep, Kept, keep_of
from featpipe.model import KEPT_DIGEST_BYTES, Model
from featpipe.names import unknown
from featpipe.progress import Progress, Tell, quiet
from featpipe.training.estimate import Estimate, calibrated_on_folds, cross_validate
from featpipe.training.fitting import Fitted, Plan
from featpipe.training.novelty import novelty_of
from featpipe.training.rows import Rows, refuse_not_finite, training_rows
from featpipe.trust import Trust

__all__ = ["Trained", "keeping", "plan_of", "train", "train_on"]

CURVES = ("loss_curve_", "validation_curve_", "validation_score_curve_")


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
    progress: Tell = quiet,
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
        What settings are chosen by, one of :data:`featpipe.training.METRICS`; the first of the task if not given.
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
    kept = keeping(keep)
    rows = training_rows(cache, output, groups=groups, times=times, since=since, without=without, memory=memory)
    plan = plan_of(
        cache,
        rows,
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
    trained = train_on(cache, rows, plan, cv, calibrate=calibrate, prior=prior, progress=progress)
    if findings is not None and trained.estimate is not None:
        write_findings(_suspects(cache, rows, plan.task, trained.estimate), findings)
    return trained.model(cache, rows, output, params or {}, kept)


def keeping(text: str | None) -> Keep | None:
    """What to keep, as it is typed; None is what there is room for."""
    if text is None:
        return None
    keep = Keep.of(text)
    keep.refuse_network()
    return keep


def _suspects(cache: FeatureCache, rows: Rows, task: str, estimate: Estimate) -> list[Finding]:
    """What the folds say of the rows that they were not fitted on."""
    ids = [cache.ids[row] for row in rows.rows[estimate.held].tolist()]
    return suspects(Judged(task, ids, rows.y[estimate.held], estimate.answers, rows.classes))


def plan_of(cache: FeatureCache, rows: Rows, head: str, params: Mapping[str, object], **how: Any) -> Plan:
    """The checked plan of one head."""
    settings = _by_code(params, rows.classes) if cache.task == "classification" else dict(params)
    plan = Plan(head, cache.task, settings, **how)
    plan.check()
    return plan


@dataclass(frozen=True, eq=False)
class Trained:
    """A fitted head and what is known of its quality."""

    plan: Plan
    fitted: Fitted
    estimate: Estimate | None
    calibration: Calibration | None
    trust: Trust

    def model(
        self,
        cache: FeatureCache,
        rows: Rows,
        output: str | None,
        params: Mapping[str, object],
        keep: Keep | None = None,
    ) -> Model:
        """As it is saved and used; with the settings as they were given, weights of classes by name."""
        kept = self._kept(rows, keep)
        scores = {} if self.estimate is None else {"cross_validation": self.estimate.facts()}
        return Model(
            head=self.fitted.estimator,
            head_name=self.plan.head,
            task=cache.task,
            classes=rows.classes,
            output=output or cache.outputs[0],
            facts=cache.facts,
            request=dict(cache.manifest["backbone"]),
            trained_on=_distinct(rows.digests[:, :KEPT_DIGEST_BYTES]),
            scores=_plain(scores),
            history=_history(cache, rows, self, params),
            calibration=self.calibration,
            kept=kept,
            trust=self.trust,
        )

    def _kept(self, rows: Rows, keep: Keep | None) -> Kept | None:
        """What is kept of the rows; a closed-form head is then what follows from its statistics, to the last digits."""
        if keep is None:
            keep = Keep() if rows.streamed else Keep.of(DEFAULT)
        if self.plan.task != "classification" or not keep:
            return None
        pipeline = self.fitted.estimator
        if rows.streamed and keep != Keep(statistics=True):
            raise ConfigError("keep: of features that stay in the file only statistics are kept; give more --memory")
        kept = keep_of(keep, pipeline, rows.X, rows.y, len(rows.classes))
        if kept.statistics is not None and kind_for(pipeline)[1] and not self.plan.balance:
            fit_from_statistics(pipeline, kept.statistics)
        return kept


def train_on(
    cache: FeatureCache,
    rows: Rows,
    plan: Plan,
    cv: int | None,
    *,
    calibrate: bool = False,
    prior: Mapping[str, float] | None = None,
    progress: Tell = quiet,
) -> Trained:
    """Estimate, fit and calibrate."""
    where = f"{cache.path}: head {plan.head!r}"
    if calibrate and plan.task == "regression":
        raise ConfigError("calibrate is for probabilities; a regression has none")
    try:
        offsets = _offsets(rows, plan, prior) if prior else ()
        estimate = None
        if cv or rows.since is not None:
            estimate = cross_validate(plan, rows, cv or 1, calibrate=calibrate, tell=progress, metric=plan.metric)
        progress(Progress("note", f"fitting {plan.head} on {len(rows)} images"))
        fitted = plan.fit(rows)
        if fitted.choice is not None:
            choice = fitted.choice
            progress(Progress("note", f"{plan.head}: {choice}, by {choice.metric}, {choice.how}"))
        calibration = estimate.calibration if estimate else None
        needed = plan.task != "regression" and not fitted.gives_probabilities
        if calibration is None and (calibrate or needed):
            calibration = calibrated_on_folds(plan, rows, progress)
    except ConfigError:
        raise
    except ValueError as error:  # how estimators refuse data, in scikit-learn's world
        refuse_not_finite(cache, rows.rows, rows.X)
        raise ConfigError(f"{where} cannot be fitted: {' '.join(str(error).split())}") from error
    if offsets:
        calibration = Calibration((calibration or Calibration()).temperature, offsets)
    # answers of the folds know nothing of another mix of classes
    conformal = estimate.conformal if estimate is not None and not offsets else None
    return Trained(plan, fitted, estimate, calibration, Trust(novelty_of(rows, plan.task), conformal))


def _offsets(rows: Rows, plan: Plan, prior: Mapping[str, float]) -> tuple[float, ...]:
    if plan.task != "classification":
        raise ConfigError(f"prior is for classes that exclude each other, not for {plan.task}")
    counts = np.bincount(rows.y, minlength=len(rows.classes))
    weighted = [plan.params.get(name) for name in ("class_weight", "sampling", "logit_adjustment", "priors")]
    if plan.balance or "balanced" in weighted:
        counts = np.ones_like(counts)
    elif any(weighted):
        raise ConfigError("prior takes rows as they are, or balanced: not with other weights, or logit_adjustment")
    return prior_offsets(dict(zip(rows.classes, counts.tolist(), strict=True)), prior, rows.classes)


def _by_code(params: Mapping[str, object], classes: tuple[str, ...]) -> dict[str, object]:
    """The settings for a head that is fitted on class numbers: weights of classes are given by name."""
    translated = dict(params)
    weights = params.get("class_weight")
    if isinstance(weights, Mapping):
        strange = [name for name in weights if name not in classes]
        if strange:
            raise unknown("class", str(strange[0]), classes, "(in class_weight)")
        translated["class_weight"] = {classes.index(name): weight for name, weight in weights.items()}
    return translated


def _history(cache: FeatureCache, rows: Rows, trained: Trained, params: Mapping[str, object]) -> dict[str, Any]:
    plan, fitted = trained.plan, trained.fitted
    unlabelled = int(np.count_nonzero(cache.ok)) - len(cache.usable)
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "trained_on": {
            "cache": cache.path.name,
            "fingerprint": cache.fingerprint,
            "rows": len(rows),
            "of": len(cache),
            "split": "given" if cache.split.any() else "all labelled rows",
            "bad": cache.bad_rows(),
            "unlabelled": unlabelled,
        },
        "params": _plain(params),
        "balance": plan.balance,
        "chosen": None if fitted.choice is None else _plain(fitted.choice.facts()),
        "streamed": rows.streamed,
        "random_state": plan.random_state,
        "seconds_to_fit": round(fitted.seconds_to_fit, 3),
        "seconds_to_tune": round(fitted.seconds_to_tune, 3),
        "curves": _curves(fitted.estimator),
        "versions": {name: version(name) for name in ("featpipe", "scikit-learn", "numpy")},
    }


def _distinct(digests: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The rows of (m, 16) bytes that differ, in order: `numpy.unique` of rows takes ten times as long."""
    words = np.ascontiguousarray(digests).view(">u8")
    first, second = (words[:, column].astype(np.uint64) for column in range(2))
    order = np.argsort(first)
    alike = np.diff(first[order]) == 0
    if alike.any():  # copies of an image, or two that begin alike
        places = np.flatnonzero(np.append(False, alike) | np.append(alike, False))
        some = order[places]
        order[places] = some[np.lexsort((second[some], first[some]))]
        order = order[np.append(True, ~(alike & (np.diff(second[order]) == 0)))]
    return np.column_stack([first[order], second[order]]).astype(">u8").view(np.uint8)


def _curves(estimator: Any) -> dict[str, Any]:
    """Losses by epoch, of heads that have epochs."""
    head = estimator[-1]
    curves = {name: getattr(head, name, None) for name in CURVES}
    return {name.rstrip("_"): _plain(curve) for name, curve in curves.items() if curve}


def _plain(value: object) -> Any:
    """A value as JSON can hold it; by its own words what JSON cannot hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return " ".join(repr(value).split())
