"""What a run found: one table, the models, the page; as the command prints it and as a notebook shows it."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from featpipe.finetuning import FineTuned
from featpipe.model import Model, load_model
from featpipe.recipe import Recipe

__all__ = ["SCHEMA", "Embedded", "Result", "Run"]

SCHEMA = "featpipe-run/1.0"
"""What ``results.json`` is called; the second number grows with what is added."""


@dataclass(frozen=True)
class Embedded:
    """What became of the images under one backbone.

    Attributes
    ----------
    backbone : str
        Its name, and what is not the default.
    cache, scored : Path
        The caches that heads learn from and are scored on; the same one unless other images are scored.
    fingerprint : str
    samples, bad : int
    embedded : int or None
        How many needed a forward pass when the cache was written.
    images_per_second : float or None
        Then.
    network_bytes : int
        Of its parameters and statistics.
    width : int
        Numbers in an embedding.
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
class Result:
    """One row of the table.

    Attributes
    ----------
    name : str
        What is particular to it; also the name of its files.
    backbone, head : str
    settings : dict
        Of the head, its output and balance among them, as far as they are not the default.
    chosen_settings : dict
        Those that were chosen on inner folds.
    per_class : int or None
        Images of each class that were learnt from; all if None.
    metric : str
        What ``score`` and ``cross_validated`` are of.
    cross_validated : dict or None
        ``value``, ``low``, ``high``, ``spread`` over the folds, ``how``, and ``metrics``.
    held_out : dict
        ``value``, ``low``, ``high``, ``n``, and ``metrics``; of draws ``spread`` and ``by_draw``, and no interval.
    goodness : float
        The cross-validated score with the sign that makes larger the better; of draws, NaN: nothing is chosen by them.
    seconds_to_fit : float or None
        On all training images, the choice of settings included; None of fine-tuning, which may go on after a kill.
    model : Path
    model_bytes, head_bytes : int
        Of the file, which also holds what it knows of its training images; and of the head alone.
    model_digest : str
        Of what decides the model.
    best : bool
        Whether it is the one that the page is about.
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

    def told_settings(self) -> str:
        """What is particular to it, for people: images of each class, and settings, given or chosen."""
        from featpipe.training.selection import shown

        parts = [f"{self.per_class} per class"] if self.per_class is not None else []
        return ", ".join([*parts, *filter(None, [shown({**self.settings, **self.chosen_settings})])])


@dataclass(frozen=True, eq=False)
class Run:
    """What a run found.

    Attributes
    ----------
    folder : Path
    recipe : Recipe
        With every head by its name.
    task : str
    results : list of Result
        In the order of the recipe.
    embedded : list of Embedded
        One for each backbone.
    report : Path
        The page.
    seconds : float
        That this run took; little, where most was done.
    versions : dict
    tuned : FineTuned or None
        What training the network too brought, where that was asked for.
    """

    folder: Path
    recipe: Recipe
    task: str
    results: list[Result]
    embedded: list[Embedded]
    report: Path
    seconds: float
    versions: Mapping[str, str] = field(default_factory=dict)
    tuned: FineTuned | None = None

    @property
    def best(self) -> Result:
        """The one with the best cross-validated score; with draws the first head, learnt from the most images."""
        return next(result for result in self.results if result.best)

    @property
    def model(self) -> Model:
        """The best one's model, loaded."""
        return load_model(self.best.model)

    def columns(self) -> dict[str, list[str]]:
        """The table as text: its columns by their headings, the better results first."""
        return _columns(self)

    def table(self) -> str:
        """The table for the terminal, with what its figures are."""
        from featpipe.cli.terminal import table

        columns = self.columns()
        words = sum(heading in ("", "backbone", "head", "settings") for heading in columns)
        shown = table(list(zip(*columns.values(), strict=True)), list(columns), right=range(words, len(columns)))
        return "\n".join([shown, "", *self.notes()])

    def notes(self) -> list[str]:
        """What the figures of the table are."""
        first = self.results[0]
        held = f"held out: on {first.held_out['n']:,} images that were not learnt from"
        if first.cross_validated is None:
            draws = f"{len(first.held_out['by_draw'])} draws of the training images"
            return [f"{held}, mean ± standard deviation over {draws}"]
        tuned = [] if self.tuned is None else [self.tuned.comparison.verdict()]
        chosen = "; the best (→) is chosen by it" if len(self.results) > 1 else ""
        folds = f"± standard deviation over {first.cross_validated['folds']} folds"
        return [f"cross-validated: on the training images, {folds}{chosen}", f"{held}, with a 95 % interval", *tuned]

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        """The table in a notebook."""
        columns = self.columns()
        rows = zip(*columns.values(), strict=True)
        head = "".join(f"<th>{html.escape(heading)}</th>" for heading in columns)
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        notes = "<br>".join(map(html.escape, [*self.notes(), f"page: {self.report}"]))
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{notes}</p>"

    def to_dict(self) -> dict[str, Any]:
        """What ``results.json`` holds, as ``pipelines/README.md`` says."""
        return {
            "schema": SCHEMA,
            "recipe": self.recipe.name,
            "question": self.recipe.question,
            "task": self.task,
            "best": self.best.name,
            "results": [_told(result, self.folder) for result in self.results],
            "backbones": [{**asdict(one), "cache": str(one.cache), "scored": str(one.scored)} for one in self.embedded],
            "finetuning": None if self.tuned is None else self.tuned.to_dict(),
            "report": self.report.name,
            "seconds": round(self.seconds, 3),
            "versions": dict(self.versions),
        }


def _told(result: Result, folder: Path) -> dict[str, Any]:
    told = asdict(result)
    del told["goodness"]
    return {**told, "model": result.model.relative_to(folder).as_posix()}


def _columns(run: Run) -> dict[str, list[str]]:
    """The columns by their headings; those that say the same of all rows, or nothing, are left out."""
    from featpipe.cli.terminal import size

    results, metric = _ordered(run.results), run.results[0].metric
    of = {one.backbone: one for one in run.embedded}
    backbones = [of[result.backbone] for result in results]
    columns = {
        "": ["→" if result.best and len(results) > 1 else "" for result in results],
        "backbone": [result.backbone if len(of) > 1 else "" for result in results],
        "head": [result.head for result in results],
        "settings": [result.told_settings() for result in results],
        f"{metric}, cross-validated": [_spread(result.cross_validated) for result in results],
        f"{metric}, held out": [_interval(result.held_out) for result in results],
        "fit": [_duration(result.seconds_to_fit) for result in results],
        "head's size": [size(result.head_bytes) for result in results],
        "images/s": ["–" if one.images_per_second is None else f"{one.images_per_second:,.0f}" for one in backbones],
        "network's size": [size(one.network_bytes) for one in backbones],
    }
    if len(of) < 2:
        del columns["images/s"], columns["network's size"]
    return {heading: cells for heading, cells in columns.items() if any(cells)}


def _duration(seconds: float | None) -> str:
    from featpipe.cli.terminal import duration

    return "–" if seconds is None else duration(seconds)


def _ordered(results: list[Result]) -> list[Result]:
    return sorted(results, key=lambda result: 0.0 if math.isnan(result.goodness) else -result.goodness)


def _spread(found: Mapping[str, Any] | None) -> str:
    from featpipe.scores import number

    return "" if found is None or found["value"] is None else f"{number(found['value'])} ± {number(found['spread'])}"


def _interval(found: Mapping[str, Any]) -> str:
    from featpipe.scores import number

    if found.get("spread") is not None:
        return _spread(found)
    if found["value"] is None:
        return "–"
    known = found["low"] is not None and found["high"] is not None
    return number(found["value"]) + (f" [{number(found['low'])}, {number(found['high'])}]" if known else "")
