"""All that there is of an expansion through the network before the first step."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.backbone import Backbone
from featpipe.cache import FeatureCache
from featpipe.calibration import Calibration
from featpipe.errors import ConfigError
from featpipe.expansion.case import Case
from featpipe.expansion.entering import REFUSED, THROUGH, Lesson, lesson_of
from featpipe.expansion.pictures import Pictures
from featpipe.expansion.step import Settings, Step
from featpipe.expansion.weighing import Weights, anchor_to, known_of, names_of, old_layers
from featpipe.finetuning import case as fine
from featpipe.finetuning.parallel import World
from featpipe.finetuning.sides import Sides
from featpipe.finetuning.start import Start, start_of
from featpipe.finetuning.unfreezing import unfrozen
from featpipe.finetuning.verb import device_of
from featpipe.model import Model
from featpipe.recipe import FineTuning
from featpipe.trust import Trust

__all__ = ["Begun", "Way"]

NOT_HERE = ("weights", "test", "keep_worse", "class_weight", "sampling")  # fields of FineTuning


@dataclass(frozen=True, eq=False)
class Way:
    """How the network is trained, and on which pictures.

    Attributes
    ----------
    tuning : FineTuning
    archives : list of path-like
        Of all images, those to judge by among them.
    labels, cache
        As `expand` takes them.
    resume : bool
    out : path-like or None
        Where the model is going to be; a checkpoint lies beside it until then.
    """

    tuning: FineTuning
    archives: list[Any]
    labels: Any
    cache: str | os.PathLike[str]
    resume: bool
    out: str | os.PathLike[str] | None = None

    @classmethod
    def of(
        cls,
        method: str | None,
        archives: list[Any],
        params: Mapping[str, Any],
        unfreeze: Any,
        labels: Any,
        cache: str | os.PathLike[str],
        resume: bool,
    ) -> tuple[Way, dict[str, Any]]:
        """The way, and what is left of the settings for the methods on features.

        Raises
        ------
        ConfigError
            If the method cannot go into the network, or a setting is unknown or has no place in an expansion.
        """
        if method in REFUSED:
            raise ConfigError(f"{method} {REFUSED[method]}. What works with --unfreeze: {', '.join(THROUGH)}")
        for name in NOT_HERE:
            if name in params:
                raise ConfigError(f"setting {name} is for `featpipe finetune`, and not for an expansion; leave it out")
        ours = {field.name for field in fields(Settings)} - {"epochs"}
        rest = {name: value for name, value in params.items() if name not in ours}
        tuning = FineTuning.of({**rest, "unfreeze": unfreeze})
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("expand --unfreeze runs in one process, and torchrun started several; start it by itself")
        return cls(tuning, archives, labels, cache, resume), {n: v for n, v in params.items() if n in ours}


@dataclass(frozen=True, eq=False)
class Begun:
    """All that is there before the first step.

    Attributes
    ----------
    case : Case
        Of `expand`.
    method : str
    whole : Step
        With all images but those that it is judged by.
    lesson : Lesson
    backbone : Backbone
        Before, with the one output that the head is on.
    rows : ndarray of shape (m,), int64
        Where the lesson's pool is among the pictures.
    tested : ndarray of shape (t,), int64
        Where the test images are.
    tuned_by : featpipe.finetuning.case.Case
    start : Start
    known : mapping or None
        Importances of the weights for the old classes, by parameter; those of the last layer of shape (k, …).
    """

    case: Case
    method: str
    whole: Step
    lesson: Lesson
    backbone: Backbone
    rows: NDArray[np.int64]
    tested: NDArray[np.int64]
    tuned_by: fine.Case
    start: Start
    known: Weights | None = None

    @classmethod
    def of(cls, case: Case, method: str, way: Way, whole: Step) -> Begun:
        """Where the method on features ends, and what holds the network to the old classes from there."""
        backbone = _backbone(case.model)
        unfrozen(backbone, str(way.tuning.unfreeze))  # a mistake is told before there is work
        lesson = lesson_of(whole, method, way.tuning.validation)
        pictures = Pictures.of(case.model, way.archives, way.labels, way.cache, case.tell)
        rows, tested = pictures.rows(lesson.pool), pictures.rows(case.rows.test)
        sides = _sides(case, lesson, rows, tested, len(pictures.index))
        first, device = _expanded(case, method, lesson), device_of(way.tuning.device)
        start = start_of(first, lesson.pool.X[lesson.train], lesson.pool.y[lesson.train])
        for text in (sides.how, start.how):
            case.note(text)
        tuned_by = fine.Case(
            first, pictures.index, pictures.before, sides, way.tuning, device, World(), way.cache, way.out, case.tell
        )
        begun = cls(case, method, whole, lesson, backbone, rows, tested, tuned_by, start)
        return begun._held(pictures)

    def _held(self, pictures: Pictures) -> Begun:
        settings, whole, tuned_by, known = self.case.settings, self.whole, self.tuned_by, None
        strength = settings.strength
        distill = THROUGH[self.method].distill
        past = self.lesson.past(
            self.rows, len(pictures.index), strength if self.method == "distill" and strength is not None else distill
        )
        if self.method == "ewc":
            known = known_of(tuned_by, self.backbone, whole, pictures)
            heavy = int(whole.counts.sum()) * (1.0 if strength is None else strength) / len(tuned_by.sides.train)
            some = {name: known[name] for name in names_of(tuned_by, self.backbone, self.start.layers)}
            anchor = anchor_to(self.start.layers, old_layers(whole), some, heavy, self.backbone.network)
            past = replace(past, anchor=anchor)
        return replace(self, tuned_by=replace(tuned_by, past=replace(past, facts=self._facts())), known=known)

    def _facts(self) -> dict[str, Any]:
        """What decides the training beside what fine-tuning asks itself."""
        settings, model = vars(self.case.settings), self.case.model
        return {"method": self.method, "k_old": self.whole.k_old, "settings": settings, "from": model.identity}

    def embeddings(self, cache: FeatureCache, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Of some rows of the pictures, shape (m, d)."""
        return np.asarray(cache.features(self.case.model.output)[rows], np.float32)


def _backbone(model: Model) -> Backbone:
    (output,) = (output for output in model.backbone.outputs if output.name == model.output)
    return replace(model.backbone, outputs=(output,))


def _expanded(case: Case, method: str, lesson: Lesson) -> Model:
    """The model that the method on features gives."""
    model = case.model
    calibration = None if model.calibration is None else Calibration(model.calibration.temperature)
    return replace(
        model,
        head=THROUGH[method].head(lesson.step),
        classes=case.growth.classes,
        calibration=calibration,
        kept=None,
        trust=Trust(),
        scores={},
    )


def _sides(case: Case, lesson: Lesson, rows: NDArray[np.int64], tested: NDArray[np.int64], n: int) -> Sides:
    """Rows of the pictures, of which there are n, and their classes."""
    y = np.full(n, -1, np.int64)
    y[tested], y[rows] = case.rows.test.y, lesson.pool.y
    train, watched, held = np.sort(rows[lesson.train]), np.sort(rows[~lesson.train]), np.unique(tested)
    how = f"{len(train)} images to train on, {len(watched)} to say when to stop, {len(held)} to judge by"
    return Sides(train, watched, held, y, how)
