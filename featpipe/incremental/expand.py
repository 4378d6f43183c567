"""`expand`: add classes to a model, and measure the effect on the old ones."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from featpipe.cache import FeatureCache
from featpipe.config import unknown_name_error
from featpipe.errors import CacheError, ConfigError, ModelError
from featpipe.finetuning import NON_TRAINING_SETTINGS, checkpoint_path_for
from featpipe.incremental.context import ExpansionContext
from featpipe.incremental.dataset import (
    ClassMapping,
    compute_request_digest,
    find_labels,
    load_expansion_data,
)
from featpipe.incremental.deep import DeepTrainingConfig, expand_network
from featpipe.incremental.methods import METHODS
from featpipe.incremental.problem import ExpansionConfig
from featpipe.incremental.result import Expansion, build_expanded_model
from featpipe.incremental.select_method import select_and_fit
from featpipe.model import Model, RetentionPolicy, load_model
from featpipe.runtime import ProgressCallback, ignore_progress
from featpipe.storage import Receipt
from featpipe.training import as_list, open_caches

logger = logging.getLogger(__name__)


def expand(
    model: Model | str | os.PathLike[str],
    data: Any = (),
    *,
    method: str | None = None,
    memory: int | None = None,
    budget: int | None = None,
    drop: Sequence[str] = (),
    merge: Mapping[str, Sequence[str]] | None = None,
    test: Any = (),
    calibration: Any = (),
    keep: str | None = None,
    params: Mapping[str, object] | None = None,
    labels: Any = None,
    cache: str | os.PathLike[str] = "cache",
    unfreeze: str | int | float = "head",
    resume: bool = True,
    out: str | os.PathLike[str] | None = None,
    place: Callable[[Path, int], Path] | None = None,
    progress: ProgressCallback = ignore_progress,
) -> Expansion:
    """Add classes to a model (class-incremental learning).

    Images that the model was trained on are recognized by their bytes, in any cache. Only ``joint`` trains on them
    again.

    Parameters
    ----------
    model : Model or path of one
    data : FeatureCache, path of one, archives, or a sequence of these
        Images of new classes; new images of old classes may be among them. Nothing, to only drop or merge classes.
    method : str, optional
        One of :data:`featpipe.incremental.METHODS`, or ``all``, which compares them. Default: ``joint`` if all images
        that the model was trained on are given; else ``statistics`` for heads with an exact closed form; else
        ``replay`` if the model retains exemplars; else ``statistics`` if it retains those; else ``frozen-old``.
    memory : int, optional
        Exemplars of each class that ``replay`` uses and that the new model retains; as many as the model retains, or
        20.
    budget : int, optional
        Bytes that the new model may retain for its method; the recommendation of ``all`` respects it.
    drop : sequence of str
        Classes to remove.
    merge : mapping from class to classes, optional
        Classes that become one, by its name.
    test : as ``data``
        Test images, never trained on. If there are none, and the labels have no split, a fifth of the new images are
        held out for the test and trained on afterwards.
    calibration : as ``data``
        Images to calibrate probabilities and prediction sets, used for nothing else; in addition to images that the
        other labels mark as ``validation``. Prediction sets need some of every class.
    keep : str, optional
        What the new model retains, as for :func:`featpipe.train`; the same as this model if not given.
    params : mapping, optional
        ``epochs``, ``selection``, ``temperature``, ``strength``, see
        :class:`featpipe.incremental.problem.ExpansionConfig`; with ``unfreeze`` also fields of
        :class:`featpipe.config.FineTuneConfig`, of which ``epochs`` is then one.
    labels, cache
        For archives, as for :func:`featpipe.extract`.
    unfreeze : str, int or float
        Experimental: the part of the network to train too, as :class:`featpipe.config.FineTuneConfig` describes it;
        ``head`` trains none of it. For ``joint``, ``replay``, ``distill``, ``ewc`` and ``naive``, with archives and
        without ``calibration``.
    resume : bool
        With ``unfreeze``, resume an interrupted run from its checkpoint.
    out : path-like, optional
        Where the model is saved. If the same call has written that file before, it is reused.
    place : callable, optional
        From the path of the old model and the number of classes to the path of the new one, if ``out`` is not given.
    progress : callable

    Returns
    -------
    Expansion
        The ``model``, and the effect on old and new classes.

    Raises
    ------
    ConfigError
        If a name is unknown, there is nothing to learn, or the method lacks what it needs.
    CacheError
        If a cache has no labels, or its embeddings differ from those of the model.

    Examples
    --------
    >>> expand("photos.model", "cache/more.h5", method="replay").model          # doctest: +SKIP
    """
    model = model if isinstance(model, Model) else load_model(model)
    _check_task_and_method(model, method)
    params, trains_network = dict(params or {}), str(unfreeze).strip() != "head"
    merges = sorted((name, tuple(sources)) for name, sources in (merge or {}).items())
    training_params = sorted((name, value) for name, value in params.items() if name not in NON_TRAINING_SETTINGS)
    request_settings: list[Any] = [method, memory, budget, tuple(drop), merges, keep, training_params]
    deep_config = None
    if trains_network:
        if as_list(calibration):
            raise ConfigError("--calibration is not supported with --unfreeze; leave one of them out")
        request_settings.append(str(unfreeze))
        deep_config, params = DeepTrainingConfig.from_params(
            method, params, unfreeze, (data, test), labels=labels, cache_folder=cache, resume=resume
        )
    settings = ExpansionConfig.from_params(params | ({} if memory is None else {"memory": memory}))
    policy = None if keep is None else RetentionPolicy.from_text(keep)
    if policy is not None and not trains_network and (model.kept is None or model.kept.network is None):
        policy.raise_if_network()
    train_caches, test_caches, calibration_caches = (
        _open_classification_caches(model, as_list(source), labels, cache, progress)
        for source in (data, test, calibration)
    )
    request = compute_request_digest(
        [*train_caches, *test_caches, *calibration_caches],
        (len(train_caches), len(test_caches), tuple(request_settings)),
    )
    if (finished := _load_finished(model, request, out)) is not None:  # this model itself may be the result
        return finished
    class_mapping = ClassMapping.from_labels(model.classes, find_labels(train_caches), drop, merge)
    if out is None and place is not None and model.path is not None:
        out = place(model.path, len(class_mapping.classes))
        if (finished := _load_finished(model, request, out)) is not None:
            return finished
    expansion_data = load_expansion_data(
        model, class_mapping, train_caches, test_caches, calibration_caches, reject_renamed=method != "joint"
    )
    context = ExpansionContext(
        model, class_mapping, expansion_data, settings, memory is not None, budget, policy, progress
    )
    context.validate()
    cache_names = [cache.path.name for cache in train_caches]
    if deep_config is not None:
        expansion = expand_network(context, method, replace(deep_config, out=out), cache_names, request)
    else:
        expansion = build_expanded_model(context, select_and_fit(context, method), cache_names, request)
    if out is not None:
        expansion.model.save(out)
        expansion.model.path = Path(out)
        checkpoint_path_for(out).unlink(missing_ok=True)
    return expansion


def _check_task_and_method(model: Model, method: str | None) -> None:
    if model.task != "classification":
        raise ConfigError(f"expand is for classification, and this model is for {model.task}; train a new model")
    if method is not None and method not in METHODS and method != "all":
        raise unknown_name_error("method", method, [*METHODS, "all"])


def _open_classification_caches(
    model: Model, items: list[Any], labels: Any, cache_folder: str | os.PathLike[str], progress: ProgressCallback
) -> list[FeatureCache]:
    caches = open_caches(model, items, labels, cache_folder, progress) if items else []
    for cache in caches:
        model.check_cache(cache)
        if cache.task != "classification":
            label_problem = "no labels" if cache.task == "none" else f"labels for {cache.task}"
            raise CacheError(
                f"{cache.path}: has {label_problem}; give one class for each image, with folders or --labels"
            )
    return caches


def _load_finished(model: Model, request: str, out: str | os.PathLike[str] | None) -> Expansion | None:
    """The expansion saved at ``out``, if the same request made it from this model."""
    if out is None or not Path(out).is_file():
        return None
    try:
        saved_model = load_model(out)
    except ModelError:
        return None
    last_expansion = (saved_model.history.get("expansions") or [{}])[-1]
    base_model = last_expansion.get("from", "")
    is_same_file = model.path is not None and Path(out).exists() and os.path.samefile(out, model.path)
    receipt = Receipt(last_expansion.get("request", ""), inputs=base_model)
    if not receipt.is_current(request, inputs=base_model if is_same_file else model.identity):
        return None
    logger.info(f"{out}: up to date, nothing to do")
    return Expansion.from_dict(saved_model, saved_model.scores["expansion"]["result"])
