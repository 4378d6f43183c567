"""Run a recipe: its stages in order; finished work is reused."""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from time import perf_counter
from typing import Any

from featpipe.config import unknown_name_error
from featpipe.data import Index
from featpipe.diagnostics import write_findings
from featpipe.errors import ConfigError
from featpipe.evaluation import Evaluation, evaluate
from featpipe.experiments.dataset import (
    BackboneCaches,
    TrainTestSplit,
    extract_backbone,
    load_index,
    load_test_index,
    resolve_archives,
    select_available_shots,
    split_cache_rows,
)
from featpipe.experiments.finetune import FineTuneRun
from featpipe.experiments.grid import TrialSpec, list_trials, resolve_recipe
from featpipe.experiments.recipe.parse import read_recipe
from featpipe.experiments.recipe.schema import Recipe
from featpipe.experiments.result import RunResult, TrialResult, recipe_to_toml, sort_by_score
from featpipe.experiments.trial import TrialRun
from featpipe.metrics import SELECTION_METRICS, Interval
from featpipe.model import load_model
from featpipe.report import ComparisonRow, write_report
from featpipe.runtime import ProgressBar, ProgressCallback, ignore_progress, in_notebook
from featpipe.storage import (
    RecordStore,
    atomic_write,
    claim_folder,
    compute_fingerprint,
    is_same_file,
    lock_file,
    make_writable_folder,
)
from featpipe.training import get_package_versions

logger = logging.getLogger(__name__)

TrialData = tuple[BackboneCaches, TrainTestSplit]

RUNS_FOLDER = "runs"
RESOLVED_RECIPE_NAME = "recipe.toml"  # in the folder of a run
MAX_BASELINES = 4  # with which the report compares the best model, row by row


def run(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    archive: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    *,
    changes: Mapping[str, Any] | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = True,
    progress: ProgressCallback | None = None,
) -> RunResult:
    """Run a recipe: extract embeddings, train and score every head, and write a report.

    Finished stages are reused, also after an interrupted run.

    Parameters
    ----------
    recipe : str, path-like, mapping or Recipe
        Name of a built-in recipe (see ``featpipe run --list``), a TOML file, or its contents.
    archive : path-like or sequence of path-like, optional
        Images to use instead of those of the recipe.
    changes : mapping from dotted key to value, optional
        Overrides: ``{"heads.0.C": [0.1, 1]}``.
    out : path-like, optional
        Folder of the run. By default ``runs/NAME``.
    overwrite : bool
        Write to a folder that holds the run of another recipe, or other files; False raises a ConfigError for it.
    progress : callable, optional
        Receives :class:`featpipe.runtime.Progress`. By default, bars are shown in notebooks only.

    Returns
    -------
    RunResult
        With the table, the best model, and the path of the report.

    Raises
    ------
    ConfigError
        If the recipe is invalid; names file, table and key.

    Examples
    --------
    >>> result = run("linear-probe", "photos/", changes={"heads.0.C": 1})           # doctest: +SKIP
    >>> result.best.held_out["value"], result.model.predict(["a.jpg"])               # doctest: +SKIP
    """
    started = perf_counter()
    parsed_recipe = read_recipe(recipe, changes, archive)
    folder = get_run_folder(parsed_recipe, out)
    make_writable_folder(folder, ConfigError, "--out")
    if progress is None:
        progress = ProgressBar() if in_notebook() else ignore_progress
    with lock_file(folder / ".lock"):
        context = ExperimentContext.from_recipe(parsed_recipe, folder, progress, get_tiles_folder(parsed_recipe))
        is_unchanged_file = isinstance(recipe, (str, os.PathLike)) and not changes and archive is None
        if not is_unchanged_file or not is_same_file(folder / RESOLVED_RECIPE_NAME, str(recipe)):
            claim_folder(folder, _digest_recipe(context.recipe), overwrite=overwrite)
        max_images = context.recipe.samples.images
        caches = [
            extract_backbone(extraction, context.index, context.test_index, max_images, progress)
            for extraction in context.recipe.extractions
        ]
        results, data = _run_trials(context, caches)
        finetune_run, finetuned = None, None
        if context.recipe.finetune is not None:
            probe = next(result for result in results if result.best)
            finetune_run = _make_finetune_run(context, probe, *data[probe.name])
            finetuned = finetune_run.run()
            tuned_result = finetune_run.make_result(finetuned)
            results = [replace(result, best=result.best and not tuned_result.best) for result in results]
            results.append(tuned_result)
        run_result = RunResult(
            folder,
            context.recipe,
            context.task,
            results,
            [backbone_caches.summarize() for backbone_caches in caches],
            folder / "report.html",
            0.0,
            get_package_versions(),
            finetuned,
        )
        _write_report(context, data, run_result, finetune_run)
        run_result = replace(run_result, seconds=perf_counter() - started)
        _write_outputs(run_result)
    return run_result


def _run_trials(
    context: ExperimentContext, caches: Sequence[BackboneCaches]
) -> tuple[list[TrialResult], dict[str, TrialData]]:
    """Run the trials, and mark the best; the second result has the data of each trial by its name."""
    results, data = [], {}
    for trial_run in iter_trials(context, caches):
        results.append(trial_run.run())
        data[trial_run.trial.slug] = trial_run.caches, trial_run.split
    return _mark_best(results), data


def _digest_recipe(recipe: Recipe) -> str:
    """Digest of what a recipe runs; its name, its file and its question decide nothing."""
    settings = asdict(replace(recipe, name="", where="", question=""))
    return compute_fingerprint(json.loads(json.dumps(settings, default=str)))


def get_run_folder(recipe: Recipe, out: str | os.PathLike[str] | None) -> Path:
    """Folder of the run; by default named after the recipe."""
    return Path(RUNS_FOLDER) / recipe.name if out is None else Path(out)


def get_tiles_folder(recipe: Recipe) -> Path:
    """Folder of the built-in archive: beside the caches, shared by all runs."""
    return Path(recipe.extractions[0].cache) / "tiles"


@dataclass(frozen=True, eq=False)
class ExperimentContext:
    """The data that the stages of a run share: the recipe resolved for the task, its trials, and the images.

    The images of `test_index` are scored instead of held-out images of `index`.
    """

    recipe: Recipe
    trials: list[TrialSpec]
    task: str
    index: Index
    test_index: Index | None
    folder: Path
    progress: ProgressCallback

    @classmethod
    def from_recipe(
        cls, parsed_recipe: Recipe, folder: Path, progress: ProgressCallback, tiles_folder: Path
    ) -> ExperimentContext:
        """List the images and validate the recipe against their labels.

        Parameters
        ----------
        parsed_recipe : Recipe
        folder : Path
            Folder of the run.
        progress : callable
        tiles_folder : Path
            Where the built-in archive is written, if the recipe uses it.
        """
        index = load_index(parsed_recipe.samples, tiles_folder, parsed_recipe.where)
        task = index.labels.task
        metric = parsed_recipe.training.metric
        if metric is not None and metric not in SELECTION_METRICS[task]:
            problem = unknown_name_error("metric", metric, SELECTION_METRICS[task])
            raise ConfigError(f"{parsed_recipe.where}: [training] {problem} (the task of the labels is {task})")
        recipe = resolve_recipe(parsed_recipe, task)
        if recipe.split.per_class and task != "classification":
            raise ConfigError(
                f"{parsed_recipe.where}: [split] per_class needs classification; the task of the labels is {task}"
            )
        test_index = load_test_index(recipe.evaluation, recipe.samples, tiles_folder)
        if test_index is not None and test_index.labels.task != task:
            raise ConfigError(
                f"{parsed_recipe.where}: [evaluation] archive has labels for {test_index.labels.task}, the training "
                f"images for {task}; give labels of the same task"
            )
        return cls(recipe, list_trials(recipe), task, index, test_index, folder, progress)


def iter_trials(context: ExperimentContext, caches: Sequence[BackboneCaches | None]) -> Iterator[TrialRun]:
    """Iterate over the trials, grouped by backbone and output so that one set of features is in memory.

    Parameters
    ----------
    context : ExperimentContext
    caches : sequence of BackboneCaches or None
        One for each backbone; None skips its trials.
    """
    recipe, folder = context.recipe, context.folder
    records, requested_shots = RecordStore(folder / "records"), recipe.split.per_class
    for (backbone_index, output), trials in groupby(
        context.trials, lambda trial: (trial.backbone_index, trial.head.output)
    ):
        backbone_caches = caches[backbone_index]
        if backbone_caches is None:
            continue
        training, split = split_cache_rows(
            backbone_caches.cache, backbone_caches.test_cache, output, recipe.split, recipe.training.memory, folder
        )
        available_shots = select_available_shots(training, requested_shots) if requested_shots else []
        if requested_shots and not available_shots:
            raise ConfigError(
                f"{recipe.where}: [split] per_class is {list(requested_shots)}, and a class has fewer training images "
                "than each of them; give a smaller number"
            )
        for trial in trials:
            if trial.per_class is None or trial.per_class in available_shots:
                yield TrialRun(recipe, trial, backbone_caches, training, split, folder, records, context.progress)


def _mark_best(results: list[TrialResult]) -> list[TrialResult]:
    """Mark the best trial by cross-validation; with draws, which select nothing, the first head on the most images."""
    if results[0].per_class is None:
        best = max(results, key=lambda result: result.goodness)
    else:
        first = results[0]
        same_head = [result for result in results if (result.backbone, result.head) == (first.backbone, first.head)]
        best = max(same_head, key=lambda result: result.per_class or 0)
    return [replace(result, best=result is best) for result in results]


def _make_finetune_run(
    context: ExperimentContext, probe: TrialResult, caches: BackboneCaches, split: TrainTestSplit
) -> FineTuneRun:
    recipe = context.recipe
    archives, _ = resolve_archives(recipe.samples.archive, recipe.samples, get_tiles_folder(recipe))
    return FineTuneRun(recipe, archives, probe, caches, split, context.folder, context.progress)


def _write_report(
    context: ExperimentContext,
    data: Mapping[str, TrialData],
    run_result: RunResult,
    finetune_run: FineTuneRun | None,
) -> None:
    """Write the report on the best model, compared with the others, unless it is up to date."""
    recipe, folder, path = context.recipe, context.folder, run_result.report
    writes_findings = recipe.evaluation.findings
    records = RecordStore(folder / "records")
    inputs = {**run_result.to_dict(), "title": recipe.report.title, "findings": writes_findings}
    inputs |= {"seconds": None, "backbones": [summary.fingerprint for summary in run_result.embedded]}
    if records.find("page", inputs, path) is not None:
        return
    logger.info("writing the report")
    if finetune_run is not None and run_result.best.model == finetune_run.path:
        evaluation = finetune_run.evaluate()
    else:
        evaluation = _evaluate_best(run_result, *data[run_result.best.name])
    write_report(
        path,
        evaluation,
        title=recipe.report.title or recipe.question,
        comparison=[_make_comparison_row(result, run_result) for result in run_result.results],
        comparison_metric=run_result.best.metric,
        command=shlex.join(["featpipe", "run", str(folder / RESOLVED_RECIPE_NAME), "--out", str(folder)]),
    )
    if writes_findings:
        write_findings(evaluation.findings, folder / "findings")
    records.write("page", inputs, {"page": path.name}, path)


def _evaluate_best(run_result: RunResult, caches: BackboneCaches, split: TrainTestSplit) -> Evaluation:
    """Evaluate the best model against the next best ones of the same backbone."""
    best = run_result.best
    others = [result for result in run_result.results if result.backbone == best.backbone and result is not best]
    baselines = [
        load_model(result.model)
        for result in sort_by_score(others)[:MAX_BASELINES]
        if result.per_class is None and result.cross_validated
    ]
    return evaluate(
        load_model(best.model),
        split.test_cache,
        against=baselines,
        trained_on=caches.cache,
        without=split.excluded_table,
    )


def _make_comparison_row(result: TrialResult, run_result: RunResult) -> ComparisonRow:
    held_out = result.held_out
    low, high = (held_out.get(key) for key in ("low", "high"))
    bounds = (math.nan, math.nan) if low is None or high is None else (low, high)
    return ComparisonRow(
        name=result.head,
        score=Interval(math.nan if held_out["value"] is None else held_out["value"], *bounds),
        seconds_to_fit=result.seconds_to_fit,
        note=_describe_result(result, len(run_result.embedded) > 1),
        is_selected=result.best,
    )


def _describe_result(result: TrialResult, has_many_backbones: bool) -> str:
    """Backbone, settings and spread of a trial, as text."""
    parts = [f"on {result.backbone}"] if has_many_backbones else []
    parts += [result.describe_settings()] if result.describe_settings() else []
    if result.cross_validated is not None and result.cross_validated["value"] is not None:
        cross_validated = result.cross_validated
        parts.append(f"cross-validated {cross_validated['value']:.3f} ± {cross_validated['spread']:.3f}")
    elif "by_draw" in result.held_out:
        parts.append(f"mean of {len(result.held_out['by_draw'])} draws, ± {result.held_out['spread']:.3f}")
    return "; ".join(parts)


def _write_outputs(run_result: RunResult) -> None:
    """Write the results, the table, and the recipe with every default."""
    fingerprints = {f"cache of {summary.backbone}": summary.fingerprint for summary in run_result.embedded}
    texts = {
        "results.json": json.dumps(run_result.to_dict(), indent=2, ensure_ascii=False) + "\n",
        "table.txt": run_result.table() + "\n",
        RESOLVED_RECIPE_NAME: recipe_to_toml(
            run_result.recipe, run_result.task, {**run_result.versions, **fingerprints}
        ),
    }
    for name, text in texts.items():
        with atomic_write(run_result.folder / name, text=True) as file:
            file.write(text)
