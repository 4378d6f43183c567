"""A recipe, run: the stages in order, of which those that are done are skipped."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from featpipe.archive import Index
from featpipe.cache import FeatureCache
from featpipe.commit import exclusive
from featpipe.durable import make_folder, whole_file
from featpipe.errors import ConfigError
from featpipe.evaluation import Evaluation, evaluate
from featpipe.findings import write_findings
from featpipe.finetuning import FineTuned
from featpipe.model import load_model
from featpipe.names import unknown
from featpipe.pipeline.embedding import Caches, embedded
from featpipe.pipeline.outcome import Result, Run
from featpipe.pipeline.page import write_report
from featpipe.pipeline.records import Records, versions
from featpipe.pipeline.resolved import text_of
from featpipe.pipeline.samples import Divided, divided, index_of, places_of, scored_index_of, tell_short
from featpipe.pipeline.trials import resolved, trials_of
from featpipe.pipeline.trying import Attempt
from featpipe.pipeline.tuning import Tuning
from featpipe.progress import Progress, Tell, quiet
from featpipe.recipe import Recipe, read_recipe
from featpipe.report import Row
from featpipe.scores import Interval
from featpipe.training import METRICS

__all__ = ["Line", "attempts", "folder_named", "folder_of", "run", "tiles_of"]

RUNS = "runs"
RIVALS = 4  # that the page sets against the best, row by row


def run(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    archive: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    *,
    changes: Mapping[str, Any] | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: Tell | None = None,
) -> Run:
    """Run a recipe: embed, train every head that it asks for, score them, and write a page.

    What was done before from the same content is not done again, also after a kill.

    Parameters
    ----------
    recipe : str, path-like, mapping or Recipe
        A name that ``featpipe run --list`` shows, a TOML file, or what such a file holds.
    archive : path-like or sequence of path-like, optional
        The images, in place of the recipe's own.
    changes : mapping from dotted key to value, optional
        What is to be another way: ``{"heads.0.C": [0.1, 1]}``.
    out : path-like, optional
        The run's folder; ``runs/NAME`` if not given.
    progress : callable, optional
        Told what is going on. If not given, bars in a notebook, and warnings elsewhere.

    Returns
    -------
    Run
        With the table as the command prints it, the best model, and the page's path.

    Raises
    ------
    ConfigError
        If the recipe asks for what cannot be; it names file, table and key.

    Examples
    --------
    >>> found = run("linear-probe", "photos/", changes={"heads.0.C": 1})           # doctest: +SKIP
    >>> found.best.held_out["value"], found.model.predict(["a.jpg"])               # doctest: +SKIP
    """
    started = perf_counter()
    asked = read_recipe(recipe, changes, archive)
    folder = folder_of(asked, out)
    tell = progress or _bars()
    with exclusive(folder / ".lock"):
        line = Line.of(asked, folder, tell, tiles_of(asked))
        caches = line.embedded()
        results = _judged([attempt.result() for attempt in attempts(line, caches)])
        tuning, tuned = line.tuned(caches, results)
        results = results if tuning is None or tuned is None else _with_tuned(results, tuning.result(tuned))
        told = [one.told() for one in caches]
        page = _Page(line, caches, results, tuning)
        found = Run(folder, line.recipe, line.task, results, told, page.path, 0.0, versions(), tuned)
        page.write(found)
        found = replace(found, seconds=perf_counter() - started)
        _write(found)
    return found


def folder_of(recipe: Recipe, out: str | os.PathLike[str] | None) -> Path:
    """The run's folder, made if it is not there."""
    folder = folder_named(recipe, out)
    make_folder(folder, ConfigError, "--out")
    return folder


def folder_named(recipe: Recipe, out: str | os.PathLike[str] | None) -> Path:
    """Where a run lies, if nothing else is said: under the recipe's name."""
    return Path(RUNS) / recipe.name if out is None else Path(out)


def tiles_of(recipe: Recipe) -> Path:
    """Where the archive that comes along is written: beside the caches, so that all runs share it."""
    return Path(recipe.extractions[0].cache) / "tiles"


def _bars() -> Tell:
    """Bars where a notebook shows them."""
    from featpipe.cli.terminal import Terminal, in_notebook

    return Terminal() if in_notebook() else quiet


@dataclass(frozen=True, eq=False)
class Line:
    """What the stages of a run share.

    Attributes
    ----------
    recipe : Recipe
        Resolved for the task of the labels.
    task : str
    index : Index
    scored : Index or None
        Of other images, that the models are scored on.
    folder : Path
    tell : callable
    """

    recipe: Recipe
    task: str
    index: Index
    scored: Index | None
    folder: Path
    tell: Tell

    @classmethod
    def of(cls, asked: Recipe, folder: Path, tell: Tell, tiles: Path) -> Line:
        """List the images, and refuse what cannot be before any work.

        Parameters
        ----------
        asked : Recipe
        folder : Path
            The run's.
        tell : callable
        tiles : Path
            Where the archive that comes along is written, if it is asked for.
        """
        index = index_of(asked.samples, tiles, asked.where)
        task = index.labels.task
        metric = asked.training.metric
        if metric is not None and metric not in METRICS[task]:
            raise ConfigError(
                f"{asked.where}: [training] {unknown('metric', metric, METRICS[task])} (the labels are for {task})"
            )
        recipe = resolved(asked, task)
        if recipe.split.per_class and task != "classification":
            raise ConfigError(f"{asked.where}: [split] per_class draws images of classes; these labels are for {task}")
        scored = scored_index_of(recipe.evaluation, recipe.samples, tiles)
        if scored is not None and scored.labels.task != task:
            raise ConfigError(
                f"{asked.where}: [evaluation] archive has labels for {scored.labels.task}, those of training are for "
                f"{task}; give fitting ones with labels"
            )
        return cls(recipe, task, index, scored, folder, tell)

    def embedded(self) -> list[Caches]:
        """The caches of all backbones."""
        images = self.recipe.samples.images
        return [embedded(one, self.index, self.scored, images, self.tell) for one in self.recipe.extractions]

    def tuned(self, caches: Sequence[Caches], results: Sequence[Result]) -> tuple[Tuning | None, FineTuned | None]:
        """The network of the best head trained too, if that is asked for."""
        if self.recipe.finetune is None:
            return None, None
        best = next(result for result in results if result.best)
        of = next(one for one in caches if one.label == best.backbone)
        trial = next(trial for trial in trials_of(self.recipe) if trial.slug == best.name)
        sides = self.divided(of.cache, of.scored, trial.head.output)
        places, _ = places_of(self.recipe.samples.archive, self.recipe.samples, tiles_of(self.recipe))
        tuning = Tuning(self.recipe, places, best, of, sides, self.folder, self.tell)
        return tuning, tuning.found()

    def divided(self, cache: FeatureCache, scored: FeatureCache | None, output: str | None) -> Divided:
        """The sides of a cache."""
        return divided(cache, scored, output, self.recipe.split, self.recipe.training.memory, self.folder)


def attempts(line: Line, caches: Sequence[Caches | None]) -> Iterator[Attempt]:
    """The rows of the table on their way; of one backbone and output after the other, so that few rows are in memory.

    Parameters
    ----------
    line : Line
    caches : sequence of Caches or None
        One for each backbone; what is None is left out.
    """
    records = Records(line.folder / "records")
    sides: Divided | None = None
    of: tuple[int, str | None] | None = None
    for trial in trials_of(line.recipe):
        held = caches[trial.backbone]
        if held is None:
            continue
        if sides is None or of != (trial.backbone, trial.head.output):
            of = (trial.backbone, trial.head.output)
            sides = line.divided(held.cache, held.scored, trial.head.output)
            enough = _enough(line, sides)
        if trial.per_class is None or trial.per_class in enough:
            yield Attempt(line.recipe, trial, held, sides, line.folder, records, line.tell)


def _enough(line: Line, sides: Divided) -> list[int]:
    wanted = line.recipe.split.per_class
    enough = tell_short(sides.training, wanted, line.tell) if wanted else []
    if wanted and not enough:
        raise ConfigError(f"{line.recipe.where}: [split] per_class asks for more images of each class than there are")
    return enough


def _judged(results: list[Result]) -> list[Result]:
    """With the best one marked: by cross-validation; where images were drawn, the first head with the most of them."""
    if results[0].per_class is None:
        best = max(results, key=lambda result: result.goodness)
    else:
        first = results[0]
        same = [result for result in results if (result.backbone, result.head) == (first.backbone, first.head)]
        best = max(same, key=lambda result: result.per_class or 0)
    return [replace(result, best=result is best) for result in results]


def _with_tuned(results: list[Result], tuned: Result) -> list[Result]:
    """With one row more, which is the best if it was kept."""
    return [*(replace(result, best=result.best and not tuned.best) for result in results), tuned]


@dataclass(frozen=True, eq=False)
class _Page:
    """The last stage: the page of the best model, beside the others."""

    line: Line
    caches: list[Caches]
    results: list[Result]
    tuning: Tuning | None

    @property
    def path(self) -> Path:
        return self.line.folder / "report.html"

    def write(self, found: Run) -> None:
        records = Records(self.line.folder / "records")
        facts = {**found.to_dict(), "title": self.line.recipe.report.title, "findings": self._findings}
        facts |= {"seconds": None, "backbones": [one.fingerprint for one in found.embedded]}
        if records.find("page", facts, self.path) is not None:
            return
        self.line.tell(Progress("note", "writing the page"))
        evaluation = self._evaluation(found.best)
        recipe = self.line.recipe
        again = shlex.join(["featpipe", "run", str(self.line.folder / "recipe.toml"), "--out", str(self.line.folder)])
        write_report(
            self.path,
            evaluation,
            title=recipe.report.title or recipe.question,
            comparison=[_row(result, found) for result in found.results],
            compared_by=found.best.metric,
            command=again,
        )
        if self._findings:
            write_findings(evaluation.findings, self.line.folder / "findings")
        records.write("page", facts, {"page": self.path.name}, self.path)

    @property
    def _findings(self) -> bool:
        return self.line.recipe.evaluation.findings

    def _evaluation(self, best: Result) -> Evaluation:
        if self.tuning is not None and best.model == self.tuning.path:
            return self.tuning.evaluation()
        caches = next(one for one in self.caches if one.label == best.backbone)
        trial = next(trial for trial in trials_of(self.line.recipe) if trial.slug == best.name)
        sides = self.line.divided(caches.cache, caches.scored, trial.head.output)
        same = [result for result in self.results if result.backbone == best.backbone and result is not best]
        same.sort(key=lambda result: 0.0 if math.isnan(result.goodness) else -result.goodness)
        rivals = [load_model(one.model) for one in same[:RIVALS] if one.per_class is None and one.cross_validated]
        model = load_model(best.model)
        return evaluate(model, sides.scored, against=rivals, trained_on=caches.cache, without=sides.without)


def _row(result: Result, run: Run) -> Row:
    """One row of the page's comparison."""
    held = result.held_out
    low, high = (held.get(key) for key in ("low", "high"))
    bounds = (math.nan, math.nan) if low is None or high is None else (low, high)
    return Row(
        name=result.head,
        score=Interval(math.nan if held["value"] is None else held["value"], *bounds),
        seconds_to_fit=result.seconds_to_fit,
        note=_note(result, len(run.embedded) > 1),
        chosen=result.best,
    )


def _note(result: Result, several: bool) -> str:
    """What is particular to a row, and what else is known of it."""
    parts = [f"on {result.backbone}"] if several else []
    parts += [result.told_settings()] if result.told_settings() else []
    if result.cross_validated is not None and result.cross_validated["value"] is not None:
        found = result.cross_validated
        parts.append(f"cross-validated {found['value']:.3f} ± {found['spread']:.3f}")
    elif "by_draw" in result.held_out:
        parts.append(f"mean of {len(result.held_out['by_draw'])} draws, ± {result.held_out['spread']:.3f}")
    return "; ".join(parts)


def _write(run: Run) -> None:
    """What lies beside the models: the results, the table, and the recipe with every default."""
    prints = {f"cache of {one.backbone}": one.fingerprint for one in run.embedded}
    texts = {
        "results.json": json.dumps(run.to_dict(), indent=2, ensure_ascii=False) + "\n",
        "table.txt": run.table() + "\n",
        "recipe.toml": text_of(run.recipe, run.task, {**run.versions, **prints}),
    }
    for name, text in texts.items():
        with whole_file(run.folder / name, text=True) as file:
            file.write(text)
