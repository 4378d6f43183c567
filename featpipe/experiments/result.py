"""Result of a run: table, models and report, for the terminal, notebooks and JSON."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import tomli_w

from featpipe.config import ExtractionConfig
from featpipe.experiments.grid import resolve_settings
from featpipe.experiments.recipe.parse import BACKBONE_FIELDS, EXTRACTION_KEYS
from featpipe.experiments.recipe.schema import Recipe, RecipeHead
from featpipe.finetuning import FineTuningResult
from featpipe.metrics import format_score
from featpipe.model import Model, load_model
from featpipe.runtime import format_duration, format_size, format_table
from featpipe.training import format_params

RESULTS_SCHEMA = "featpipe-run/1.0"
"""Format of ``results.json``; the minor version grows when keys are added."""


@dataclass(frozen=True)
class EmbeddingSummary:
    """Summary of the extraction with one backbone.

    Attributes
    ----------
    backbone : str
        Name and the settings that differ from the defaults.
    cache, scored : Path
        The caches of the training and of the test images; equal unless other images are scored.
    fingerprint : str
    samples, bad : int
        Number of images in the cache, and of those without features.
    embedded, images_per_second : int, float or None
        Forward passes when the cache was written, and their rate.
    network_bytes : int
        Size of the parameters and statistics.
    width : int
    """

    backbone: str
    cache: Path
    scored: Path
    fingerprint: str
    samples: int
    bad: int
    embedded: int | None
    images_per_second: float | None
    network_bytes: int
    width: int


@dataclass(frozen=True)
class TrialResult:
    """One row of the table.

    Attributes
    ----------
    name : str
        Name of the trial and of its files.
    backbone, head : str
    settings : dict
        Settings of the head, its output and balance, without defaults.
    chosen_settings : dict
        Settings that were selected on inner folds.
    per_class : int or None
        Training images per class; None for all.
    metric : str
        Metric of `cross_validated` and `held_out`.
    cross_validated : dict or None
        ``value``, ``low``, ``high``, ``spread`` over the folds, ``how``, and ``metrics``.
    held_out : dict
        ``value``, ``low``, ``high``, ``n``, and ``metrics``; with draws ``spread`` and ``by_draw``, and no interval.
    goodness : float
        The cross-validated score, with the sign that makes larger values better; NaN with draws, which select nothing.
    seconds_to_fit : float or None
        On all training images, including the search for settings; None for fine-tuning, which may have been resumed.
    model : Path
    model_bytes, head_bytes : int
        Size of the model file, and of the head alone.
    model_digest : str
        Digest of the inputs that determine the model.
    best : bool
        Whether it is the best trial, which the report describes.
    """

    name: str
    backbone: str
    head: str
    settings: dict[str, Any]
    chosen_settings: dict[str, Any]
    per_class: int | None
    metric: str
    cross_validated: dict[str, Any] | None
    held_out: dict[str, Any]
    goodness: float
    seconds_to_fit: float | None
    model: Path
    model_bytes: int
    head_bytes: int
    model_digest: str
    best: bool = False

    def describe_settings(self) -> str:
        """Images per class, and given and chosen settings, as text."""
        parts = [f"{self.per_class} per class"] if self.per_class is not None else []
        return ", ".join([*parts, *filter(None, [format_params({**self.settings, **self.chosen_settings})])])

    def to_dict(self, folder: Path) -> dict[str, Any]:
        document = asdict(self)
        del document["goodness"]
        return {**document, "model": self.model.relative_to(folder).as_posix()}


@dataclass(frozen=True, eq=False)
class RunResult:
    """Result of a run.

    Attributes
    ----------
    folder : Path
    recipe : Recipe
        Resolved for the task: every head by its name.
    task : str
    results : list of TrialResult
        In the order of the recipe.
    embedded : list of EmbeddingSummary
        One for each backbone.
    report : Path
        The HTML report.
    seconds : float
        Duration of this run, without reused work.
    versions : dict
    tuned : FineTuningResult or None
        Result of fine-tuning, if the recipe has it.
    """

    folder: Path
    recipe: Recipe
    task: str
    results: list[TrialResult]
    embedded: list[EmbeddingSummary]
    report: Path
    seconds: float
    versions: Mapping[str, str] = field(default_factory=dict)
    tuned: FineTuningResult | None = None

    @property
    def best(self) -> TrialResult:
        """The trial with the best cross-validated score; with draws, the first head with the most images."""
        return next(result for result in self.results if result.best)

    @property
    def model(self) -> Model:
        """The loaded model of the best trial."""
        return load_model(self.best.model)

    def columns(self) -> dict[str, list[str]]:
        """Columns of the table as text, best trial first; empty columns and those equal for all rows are omitted."""
        sorted_results, metric = sort_by_score(self.results), self.results[0].metric
        summary_by_backbone = {summary.backbone: summary for summary in self.embedded}
        summaries = [summary_by_backbone[result.backbone] for result in sorted_results]
        columns = {
            "": ["→" if result.best and len(sorted_results) > 1 else "" for result in sorted_results],
            "backbone": [result.backbone if len(summary_by_backbone) > 1 else "" for result in sorted_results],
            "head": [result.head for result in sorted_results],
            "settings": [result.describe_settings() for result in sorted_results],
            f"{metric}, cross-validated": [_format_spread(result.cross_validated) for result in sorted_results],
            f"{metric}, held out": [_format_interval(result.held_out) for result in sorted_results],
            "fit": [
                "–" if result.seconds_to_fit is None else format_duration(result.seconds_to_fit)
                for result in sorted_results
            ],
            "head's size": [format_size(result.head_bytes) for result in sorted_results],
            "images/s": [
                "–" if summary.images_per_second is None else f"{summary.images_per_second:,.0f}"
                for summary in summaries
            ],
            "network's size": [format_size(summary.network_bytes) for summary in summaries],
        }
        if len(summary_by_backbone) < 2:
            del columns["images/s"], columns["network's size"]
        return {heading: cells for heading, cells in columns.items() if any(cells)}

    def table(self) -> str:
        """The table and its legend for the terminal."""
        columns = self.columns()
        n_text_columns = sum(heading in ("", "backbone", "head", "settings") for heading in columns)
        text = format_table(
            list(zip(*columns.values(), strict=True)), list(columns), right_aligned=range(n_text_columns, len(columns))
        )
        return "\n".join([text, "", *self.notes()])

    def notes(self) -> list[str]:
        """Legend of the table."""
        first = self.results[0]
        held_out_note = f"held out: on {first.held_out['n']:,} images that were not trained on"
        if first.cross_validated is None:
            draws = f"{len(first.held_out['by_draw'])} draws of the training images"
            return [f"{held_out_note}, mean ± standard deviation over {draws}"]
        finetuning_notes = [] if self.tuned is None else [self.tuned.comparison.verdict()]
        selection_note = "; selects the best (→)" if len(self.results) > 1 else ""
        spread_note = f"± standard deviation over {first.cross_validated['folds']} folds"
        return [
            f"cross-validated: on the training images, {spread_note}{selection_note}",
            f"{held_out_note}, with a 95 % interval",
            *finetuning_notes,
        ]

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        """The table as HTML, for notebooks."""
        columns = self.columns()
        rows = zip(*columns.values(), strict=True)
        header = "".join(f"<th>{html.escape(heading)}</th>" for heading in columns)
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        notes = "<br>".join(map(html.escape, [*self.notes(), f"page: {self.report}"]))
        return f"<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table><p>{notes}</p>"

    def to_dict(self) -> dict[str, Any]:
        """Contents of ``results.json``, as specified in ``pipelines/README.md``."""
        return {
            "schema": RESULTS_SCHEMA,
            "recipe": self.recipe.name,
            "question": self.recipe.question,
            "task": self.task,
            "best": self.best.name,
            "results": [result.to_dict(self.folder) for result in self.results],
            "backbones": [
                {**asdict(summary), "cache": str(summary.cache), "scored": str(summary.scored)}
                for summary in self.embedded
            ],
            "finetuning": None
            if self.tuned is None
            else {"verdict": self.tuned.comparison.verdict(), **self.tuned.to_dict()},
            "report": self.report.name,
            "seconds": round(self.seconds, 3),
            "versions": dict(self.versions),
        }


def sort_by_score(results: list[TrialResult]) -> list[TrialResult]:
    """The results, best cross-validated score first; those without one keep their order."""
    return sorted(results, key=lambda result: 0.0 if math.isnan(result.goodness) else -result.goodness)


def _format_spread(metric: Mapping[str, Any] | None) -> str:
    return (
        ""
        if metric is None or metric["value"] is None
        else f"{format_score(metric['value'])} ± {format_score(metric['spread'])}"
    )


def _format_interval(metric: Mapping[str, Any]) -> str:
    if metric.get("spread") is not None:
        return _format_spread(metric)
    if metric["value"] is None:
        return "–"
    has_bounds = metric["low"] is not None and metric["high"] is not None
    return format_score(metric["value"]) + (
        f" [{format_score(metric['low'])}, {format_score(metric['high'])}]" if has_bounds else ""
    )


def recipe_to_toml(recipe: Recipe, task: str, provenance: Mapping[str, str]) -> str:
    """Format a resolved recipe as TOML, with every default.

    Parameters
    ----------
    recipe : Recipe
        Resolved for this task.
    task : str
    provenance : mapping
        Versions and fingerprints, written as comments at the top.
    """
    stages: dict[str, Any] = {"split": recipe.split, "training": recipe.training}
    stages |= {} if recipe.finetune is None else {"finetune": recipe.finetune}
    stages |= {"evaluation": recipe.evaluation, "report": recipe.report}
    comments = [f"#   {key} {value}" for key, value in provenance.items()]
    samples = tomli_w.dumps({"question": recipe.question, **_get_set_fields(recipe.samples)})
    extraction = _select_fields(recipe.extractions[0], {key: key for key in EXTRACTION_KEYS})
    sections = [
        "\n".join([f"# {recipe.name}, with every default. Made with:", *comments]) + "\n",
        samples + _list_unset_fields(recipe.samples),
        f"[extraction]\n{tomli_w.dumps(extraction)}",
        *(_array_to_toml("backbones", _select_fields(config, BACKBONE_FIELDS)) for config in recipe.extractions),
        *(_array_to_toml("heads", _head_to_dict(head, task)) for head in recipe.heads),
        *(_stage_to_toml(name, stage) for name, stage in stages.items()),
    ]
    return "\n".join(sections)


def _stage_to_toml(name: str, stage: Any) -> str:
    """One table; a comment lists the keys that are not set, because TOML has no null."""
    header = f"[{name}]\n"
    return tomli_w.dumps({name: _get_set_fields(stage)}).replace(header, header + _list_unset_fields(stage), 1)


def _get_set_fields(stage: Any) -> dict[str, Any]:
    values = _drop_none({field.name: getattr(stage, field.name) for field in fields(stage)})
    return {name: value for name, value in values.items() if value != {}}


def _list_unset_fields(stage: Any) -> str:
    set_fields = _get_set_fields(stage)
    names = [field.name for field in fields(stage) if field.name not in set_fields]
    return f"# not set: {', '.join(names)}\n" if names else ""


def _drop_none(values: Mapping[str, Any]) -> dict[str, Any]:
    toml_values = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return {key: value for key, value in toml_values.items() if value is not None}


def _select_fields(extraction: ExtractionConfig, keys: Mapping[str, str]) -> dict[str, Any]:
    return _drop_none({key: getattr(extraction, name) for key, name in keys.items()})


def _head_to_dict(head: RecipeHead, task: str) -> dict[str, Any]:
    table = _drop_none({name: getattr(head, name) for name in ("name", "output", "tune", "balance")})
    table |= {"grid": {key: list(values) for key, values in head.grid.items()}} if head.grid else {}
    return {**table, **{key: _setting_to_toml(value) for key, value in resolve_settings(head, task).items()}}


def _setting_to_toml(value: Any) -> Any:
    """Encode a setting as the parser reads it: a list within a list is one value, ``"none"`` is None."""
    if isinstance(value, (tuple, list)):
        return [_nested_to_lists(value)]
    return "none" if value is None else value


def _nested_to_lists(value: Any) -> Any:
    return [_nested_to_lists(item) for item in value] if isinstance(value, (tuple, list)) else value


def _array_to_toml(name: str, table: Mapping[str, Any]) -> str:
    """One table of an array, and the tables within it."""
    subtables = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    scalars = {key: value for key, value in table.items() if key not in subtables}
    subtable_texts = [f"\n[{name}.{key}]\n{tomli_w.dumps(value)}" for key, value in subtables.items()]
    return "".join([f"[[{name}]]\n{tomli_w.dumps(scalars)}", *subtable_texts])
