"""Dry run: shows finished and remaining stages; lists archives and reads caches and records, writes nothing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featpipe.backbones import Backbone
from featpipe.cache import FeatureCache
from featpipe.config import AUTO, ExtractionConfig
from featpipe.data import Index
from featpipe.experiments.dataset import BackboneCaches, make_run_cache_path
from featpipe.experiments.grid import make_backbone_label
from featpipe.experiments.recipe.parse import read_recipe
from featpipe.experiments.recipe.schema import Recipe
from featpipe.experiments.runner import ExperimentContext, get_run_folder, get_tiles_folder, iter_trials
from featpipe.extraction import ExtractionPlan, load_backbone
from featpipe.inference import resolve_devices
from featpipe.runtime import format_table, ignore_progress


@dataclass(frozen=True)
class PlannedExtraction:
    """The images of one backbone, test images included.

    `unknown` counts the images whose path, size and time are in no cache: they are read, and embedded unless a cache
    has their bytes. It is None if the precision must be chosen first.
    """

    backbone: str
    cache: str
    images: int
    unknown: int | None


@dataclass(frozen=True)
class PlannedTrial:
    """One row of the table, and whether it is trained and scored."""

    name: str
    trained: bool
    scored: bool


@dataclass(frozen=True)
class DryRun:
    """Planned stages of a run.

    Attributes
    ----------
    folder : Path
    task : str
    embed : list of PlannedExtraction
    train : list of PlannedTrial
    finetune : bool
        Whether the recipe fine-tunes the backbone of the best head.
    """

    folder: Path
    task: str
    embed: list[PlannedExtraction]
    train: list[PlannedTrial]
    finetune: bool

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}

    def table(self) -> str:
        """Table for the terminal."""
        extraction_rows = [
            [f"{extraction.images:,}", _format_unknown(extraction), extraction.backbone, extraction.cache]
            for extraction in self.embed
        ]
        trial_rows = [
            [trial.name, _format_state(trial.trained, "train"), _format_state(trial.scored, "score")]
            for trial in self.train
        ]
        finetune_note = (
            ["then the backbone of the best head is fine-tuned, unless that is done"] if self.finetune else []
        )
        return "\n\n".join(
            [
                format_table(extraction_rows, ["images", "to embed", "backbone", "cache"], right_aligned=[0, 1]),
                format_table(trial_rows, ["head", "", ""]),
                *finetune_note,
                f"output folder: {self.folder}; this was a dry run, nothing was written",
            ]
        )


def _format_unknown(extraction: PlannedExtraction) -> str:
    if extraction.unknown is None:
        return "after the precision is chosen"
    return f"{extraction.unknown:,}" if extraction.unknown else "none"


def _format_state(is_done: bool, verb: str) -> str:
    return "done" if is_done else f"to {verb}"


def plan_run(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    archive: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    *,
    changes: Mapping[str, Any] | None = None,
    out: str | os.PathLike[str] | None = None,
) -> DryRun:
    """Plan a run without running it; parameters and errors as for :func:`featpipe.run`.

    The backbones are loaded, because their weights are part of the identity of a cache.
    """
    parsed_recipe = read_recipe(recipe, changes, archive)
    folder = get_run_folder(parsed_recipe, out)
    with tempfile.TemporaryDirectory() as temporary_folder:
        tiles_folder = get_tiles_folder(parsed_recipe)
        context = ExperimentContext.from_recipe(
            parsed_recipe, folder, ignore_progress, tiles_folder if tiles_folder.is_dir() else Path(temporary_folder)
        )
        planned_extractions = [_plan_extraction(context, config) for config in context.recipe.extractions]
        trial_states = {}
        if (folder / "records").is_dir():
            trial_states = {
                trial_run.trial.slug: trial_run.is_done()
                for trial_run in iter_trials(context, [caches for _, caches in planned_extractions])
            }
    planned_trials = [
        PlannedTrial(trial.slug, *trial_states.get(trial.slug, (False, False))) for trial in context.trials
    ]
    return DryRun(
        folder,
        context.task,
        [extraction for extraction, _ in planned_extractions],
        planned_trials,
        context.recipe.finetune is not None,
    )


def _plan_extraction(
    context: ExperimentContext, config: ExtractionConfig
) -> tuple[PlannedExtraction, BackboneCaches | None]:
    """Count the images of a backbone that are not cached, and open its caches if they are up to date."""
    resolve_devices(config.device)
    backbone, label = load_backbone(config), make_backbone_label(config)
    path = make_run_cache_path(context.index, backbone, config, context.recipe.samples.images)
    n_images = len(context.index) + (0 if context.test_index is None else len(context.test_index))
    if config.precision == AUTO:
        return PlannedExtraction(label, str(path), n_images, None), None
    unknown, cache = _count_unknown(context.index, backbone, config, path)
    test_cache = None
    if context.test_index is not None:
        unknown_test, test_cache = _count_unknown(
            context.test_index, backbone, config, make_run_cache_path(context.test_index, backbone, config, None)
        )
        unknown += unknown_test
    is_complete = cache is not None and (context.test_index is None or test_cache is not None)
    caches = BackboneCaches(label, backbone, cache, test_cache) if is_complete and cache is not None else None
    return PlannedExtraction(label, str(path), n_images, unknown), caches


def _count_unknown(
    index: Index, backbone: Backbone, config: ExtractionConfig, path: Path
) -> tuple[int, FeatureCache | None]:
    """Count the images that are in no cache, and open the cache of this index if it is up to date."""
    plan = ExtractionPlan.build(index, backbone, config, path=path)
    return len(plan.unread_rows), plan.current_cache
