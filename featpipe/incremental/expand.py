"""The verb: a model learns more classes, and it is measured what that does to the old ones."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from featpipe.config import unknown_name_error
from featpipe.errors import ConfigError, ModelError
from featpipe.finetuning import NON_TRAINING_SETTINGS, checkpoint_path_for
from featpipe.incremental.context import ExpansionContext
from featpipe.incremental.dataset import (
    ClassMapping,
    as_list,
    compute_request_digest,
    find_labels,
    load_expansion_data,
    open_caches,
)
from featpipe.incremental.deep.images import list_archives
from featpipe.incremental.deep.setup import DeepTrainingConfig
from featpipe.incremental.deep.train import expand_network
from featpipe.incremental.methods import METHODS
from featpipe.incremental.problem import ExpansionConfig
from featpipe.incremental.result import Expansion, build_expanded_model
from featpipe.incremental.select_method import select_and_fit
from featpipe.model import Model, RetentionPolicy, load_model
from featpipe.runtime import ProgressCallback, ignore_progress
from featpipe.storage import Receipt

__all__ = ["expand"]

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
    """Teach a model more classes.

    Images that the model was trained on are known by their bytes, whatever cache they are in: ``joint`` trains on them
    again, no other method learns them twice.

    Parameters
    ----------
    model : Model or path of one
    data : FeatureCache, path of one, archives, or a sequence of these
        With the new classes, and perhaps new images of old ones. Nothing, to drop or merge classes alone.
    method : str, optional
        One of :data:`featpipe.incremental.METHODS`, or ``all``, which compares them. If not given: ``joint`` where all
        images that the model was trained on are at hand; else ``statistics`` for heads of which it is exact; else
        ``replay`` where embeddings are kept; else ``statistics`` where those are kept; else ``frozen-old``.
    memory : int, optional
        Embeddings of each class that ``replay`` uses and that the new model keeps; as many as the model keeps, or 20.
    budget : int, optional
        Bytes that the new model may keep for its method; what ``all`` recommends is within it.
    drop : sequence of str
        Classes to leave out.
    merge : mapping from class to classes, optional
        Classes that become one, by its name.
    test : as ``data``
        Images to judge by, never trained on. If there are none, and the labels come without a split, a fifth of the new
        images are held out, judged by, and then learnt too.
    calibration : as ``data``
        Images to calibrate probabilities and sets by, neither learnt nor judged by; beside those that the labels of
        the others mark ``validation``. With some of every class the new model gives sets.
    keep : str, optional
        What the new model keeps, as :func:`featpipe.train` takes it; if not given what this one does.
    params : mapping, optional
        ``epochs``, ``selection``, ``temperature``, ``strength``, see :class:`featpipe.incremental.problem.Settings`; with
        ``unfreeze`` also fields of :class:`featpipe.config.FineTuning`, of which ``epochs`` is then one.
    labels, cache
        Of archives, as :func:`featpipe.extract` takes them.
    unfreeze : str, int or float
        What of the network is trained too, as :class:`featpipe.config.FineTuning` describes it; ``head`` is nothing of
        it. It is for ``joint``, ``replay``, ``distill``, ``ewc`` and ``naive``, and for archives, without calibration.
    resume : bool
        Where the network is trained and that was interrupted, go on from the checkpoint beside ``out``.
    out : path-like, optional
        Where the model is saved. If that file is what these very arguments gave before, no work is done.
    place : callable, optional
        Where it is saved if ``out`` is not given: from the path of the model before and the number of classes.
    progress : callable

    Returns
    -------
    Expansion
        With the ``model``, and what the step did to old and new classes.

    Raises
    ------
    ConfigError
        If a name is unknown, there is nothing to learn, or the method lacks what it needs.
    CacheError
        If a cache has no labels, or other embeddings than the model.

    Examples
    --------
    >>> expand("photos.model", "cache/more.h5", method="replay").model          # doctest: +SKIP
    """
    model = model if isinstance(model, Model) else load_model(model)
    if model.task != "classification":
        raise ConfigError(
            f"expand is for models that tell classes apart, and this one does {model.task}; train it again"
        )
    if method is not None and method not in METHODS and method != "all":
        raise unknown_name_error("method", method, [*METHODS, "all"])
    params, trains_network = dict(params or {}), str(unfreeze).strip() != "head"
    request_settings: list[Any] = [
        method,
        memory,
        budget,
        tuple(drop),
        _flatten_merge(merge),
        keep,
        _select_request_params(params),
    ]
    deep_config = None
    if trains_network:
        if as_list(calibration):
            raise ConfigError("--calibration is for a network that stays as it is, not for --unfreeze; leave one out")
        request_settings += [str(unfreeze)]
        deep_config, params = DeepTrainingConfig.from_params(
            method, list_archives(data, test), params, unfreeze, labels, cache, resume
        )
    settings = ExpansionConfig.from_params(params | ({} if memory is None else {"memory": memory}))
    policy = None if keep is None else RetentionPolicy.from_text(keep)
    if policy is not None and not trains_network and (model.kept is None or model.kept.network is None):
        policy.raise_if_network()
    train_caches, test_caches, calibration_caches = (
        open_caches(model, source, labels, cache, progress) if as_list(source) else []
        for source in (data, test, calibration)
    )
    request = compute_request_digest(
        [*train_caches, *test_caches, *calibration_caches],
        (len(train_caches), len(test_caches), tuple(request_settings)),
    )
    if (finished := _load_finished(model, request, out)) is not None:
        logger.info(f"{out}: is what is asked for already")
        return finished
    class_mapping = ClassMapping.from_labels(model.classes, find_labels(train_caches), drop, merge)
    if out is None and place is not None and model.path is not None:
        out = place(model.path, len(class_mapping.classes))
        if (finished := _load_finished(model, request, out)) is not None:
            logger.info(f"{out}: is what is asked for already")
            return finished
    expansion_data = load_expansion_data(
        model,
        class_mapping,
        train_caches,
        test_caches,
        reject_renamed=method != "joint",
        calibration_caches=calibration_caches,
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


def _select_request_params(params: Mapping[str, object]) -> list[tuple[str, object]]:
    return sorted((name, value) for name, value in params.items() if name not in NON_TRAINING_SETTINGS)


def _flatten_merge(merge: Mapping[str, Sequence[str]] | None) -> list[tuple[str, tuple[str, ...]]]:
    return sorted((name, tuple(sources)) for name, sources in (merge or {}).items())


def _load_finished(model: Model, request: str, out: str | os.PathLike[str] | None) -> Expansion | None:
    """What is at the target already, if it came from this model, or is this model, by this request."""
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
    return Expansion.from_dict(saved_model, saved_model.scores["expansion"]["result"])
