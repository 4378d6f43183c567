"""The model after an expansion, and what is said of the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from featpipe.calibration import Calibration
from featpipe.expansion.arrivals import Side
from featpipe.expansion.case import Case
from featpipe.expansion.choice import Found
from featpipe.expansion.held import Held, held_by_folds, held_in_halves
from featpipe.expansion.memory import remembered, wanted, within
from featpipe.expansion.methods import METHODS
from featpipe.expansion.result import Expansion, metrics_of
from featpipe.heads.evidence import EvidenceRidgeClassifier
from featpipe.heads.grown import innermost
from featpipe.model import KEPT_DIGEST_BYTES, Model
from featpipe.training.novelty import novelty_after, novelty_of
from featpipe.training.rows import Rows
from featpipe.trust import Conformal, Novelty, Trust

__all__ = ["history_of", "model_after", "told"]

APART = (
    "lda shrinks the covariance of each class by its own rows; of old classes that got more images the two parts are "
    "shrunk apart, which is near training on all at once and not equal to it (with shrinkage=NUMBER it is equal)"
)
BALANCE = (
    "old and new classes are balanced: what stands for old images weighs as much as they did, and an offset found on "
    "rows that were held out sets new classes against old ones"
)

NO_SETS = (
    "the model gives no sets of classes: they need images of every class that it was not trained on; give them as "
    "--calibration, or all old images to --method joint"
)
ROUGH_TEMPERATURE = (
    0.25  # of a ridge, where there are too few rows to find it on: half way between 0.2 and 0.3, of tiles and emoji
)


def model_after(case: Case, found: Found, caches: Sequence[str], request: str, notes: Sequence[str] = ()) -> Expansion:
    """Put together what was found.

    Parameters
    ----------
    case : Case
    found : Found
    caches : sequence of str
        Names of what was learnt from.
    request : str
        A digest of what was asked for.
    notes : sequence of str
        What is to be said before anything else.
    """
    model, growth, rows = case.model, case.growth, case.rows
    keep = wanted(model.kept, case.keep, case.settings if case.memory_given else None, found.method)
    kept = remembered(found.step, found.pipeline, keep, retrained=found.method == "joint")
    if kept is not None and case.budget is not None:
        kept = within(kept, case.budget, METHODS[found.method].keeps if found.method in METHODS else "")
    held = _held(case, found)
    calibration = _calibration(model, found, held)
    trust = Trust(_novelty(case, found), _conformal(case, found, held, calibration))
    digests = np.concatenate([model.trained_on, rows.new.digests[:, :KEPT_DIGEST_BYTES]])
    after = replace(
        model,
        head=found.pipeline,
        head_name=_head_name(model, found),
        classes=growth.classes,
        trained_on=np.unique(digests, axis=0),
        calibration=calibration,
        kept=kept,
        trust=trust,
        scores={},
        history=history_of(case, found, caches, request),
        path=model.path if model._carries_weights else None,  # where its weights are
    )
    return told(case, found, after, _how(case, found), [*notes, *_notes(case, found, trust.conformal)])


def told(case: Case, found: Found, after: Model, how: str, notes: Sequence[str]) -> Expansion:
    """What is said of a step, also in the model after it."""
    growth, rows, judge = case.growth, case.rows, found.judge
    expansion = Expansion(
        model=after,
        method=found.method,
        new=growth.new,
        dropped=growth.dropped,
        merged=dict(growth.names),
        images={"learnt": len(rows.new), "old": len(rows.old), "tested": 0 if judge is None else len(judge.test)},
        how=how,
        before=None if judge is None else judge.outcome("before", judge.before).old,
        outcomes=found.outcomes,
        recommended=found.recommended,
        unavailable=found.unavailable,
        notes=tuple(notes),
    )
    metrics = metrics_of(found.outcomes[0]) if found.outcomes else {}
    after.scores["expansion"] = {"how": expansion.how, "metrics": metrics, "result": expansion.to_dict()}
    return expansion


def _how(case: Case, found: Found) -> str:
    if found.judge is None:
        return "not judged"
    n, given = len(found.judge.test), len(case.rows.test)
    if n == given:
        return f"{n:,} images marked or given to judge by"
    held = f"{n - given:,} new images held out, and learnt afterwards"
    return f"{given:,} images given to judge by and {held}" if given else held


def _head_name(model: Model, found: Found) -> str:
    """As the table has it; statistics put a closed-form head in the place of others."""
    head = innermost(found.pipeline[-1])
    if type(head) is type(innermost(model.head[-1])):
        return model.head_name
    return "ridge" if isinstance(head, EvidenceRidgeClassifier) else "lda"


def _held(case: Case, found: Found) -> Held:
    """Scores of rows that were held out, where the model needs them."""
    step, rows, before = found.step, case.rows.calibration, case.model
    fit = METHODS[found.method].fit if found.method in METHODS else None
    if rows is not None and len(rows):
        return held_in_halves(found.pipeline, rows, step.k)
    joint = found.method == "joint"
    sets = joint and before.trust.conformal is not None
    uncalibrated = _needs_temperature(before, found) and found.method != "frozen-old"  # it is made for the one before
    if fit is None or not (sets or uncalibrated):
        return Held((), (), step.k)
    case.note("calibrating on rows that are held out in turns")
    return held_by_folds(step, fit, old=joint)


def _needs_temperature(model: Model, found: Found) -> bool:
    had = model.calibration is not None and model.calibration.temperature != 1
    return had or not hasattr(found.pipeline, "predict_proba")


def _calibration(model: Model, found: Found, held: Held) -> Calibration | None:
    """A temperature from rows that were held out, else that of the same head; offsets were of other classes."""
    if not _needs_temperature(model, found):
        return None
    if held.temperature is not None:
        return Calibration(held.temperature)
    if model.calibration is not None and _head_name(model, found) == model.head_name:
        return Calibration(model.calibration.temperature)
    return None if hasattr(found.pipeline, "predict_proba") else Calibration(ROUGH_TEMPERATURE)


def _conformal(case: Case, found: Found, held: Held, calibration: Calibration | None) -> Conformal | None:
    before = case.model.trust.conformal
    if len(held):
        return held.conformal(calibrate=calibration is not None)
    # of classes that became one the probability is no less than that of each: sets hold it at least as often
    same = found.method == "regroup" and not case.growth.dropped
    return before if same and case.model.calibration == calibration else None


def _novelty(case: Case, found: Found) -> Novelty | None:
    """Of all images that the model learnt; those of dropped classes stay known."""
    before, step = case.model.trust.novelty, found.step
    if before is None:
        return None
    if found.method == "joint" and step.whole:
        return novelty_of(_rows(step.old + step.new, case.growth.classes), "classification")
    return novelty_after(before, len(case.model.trained_on), _rows(step.new, case.growth.classes))


def _rows(side: Side, classes: tuple[str, ...]) -> Rows:
    return Rows(np.arange(len(side)), side.X, side.y, classes, side.digests)


def _notes(case: Case, found: Found, sets: Conformal | None) -> list[str]:
    model, growth, notes = case.model, case.growth, []
    if model.calibration is not None and model.calibration.offsets:
        notes.append("the correction of priors was for the classes before, and is gone")
    if model.history.get("balance"):
        notes.append("the model was trained on resampled rows; it is expanded on rows as they are")
    if _head_name(model, found) != model.head_name:
        head = f"{_head_name(model, found)} now, and was {model.head_name}, of which statistics are no closed form"
        notes.append(f"the head is {head}")
    kept = found.step.kept
    apart = kept is not None and kept.statistics is not None and kept.statistics.kind == "apart"
    if found.method == "statistics" and apart and (found.step.new.y < growth.k_old).any():
        notes.append(APART)
    if found.method == "statistics" and growth.dropped:
        notes.append("dropped classes leave with the share of the scatter within classes that their images had")
    if found.method not in ("joint", "naive", "statistics", "regroup"):
        notes.append(BALANCE)
    if case.rows.left_out:
        notes.append("left out: " + ", ".join(f"{count:,} {why}" for why, count in case.rows.left_out.items()))
    tried = case.rows.calibration is not None and len(case.rows.calibration)
    if sets is None and (tried or model.trust.conformal is not None):
        notes.append(NO_SETS)
    for text in notes:
        case.note(text)
    return notes


def _params(found: Found) -> dict[str, Any]:
    """The settings of a head that took another's place."""
    return {"alpha": "auto"} if isinstance(innermost(found.pipeline[-1]), EvidenceRidgeClassifier) else {}


def history_of(case: Case, found: Found, caches: Sequence[str], request: str, **more: Any) -> dict[str, Any]:
    """What is remembered of the step; more of it, in its own entry."""
    model, growth = case.model, case.growth
    trained = dict(model.history.get("trained_on") or {})
    trained["rows"] = int(trained.get("rows", len(model.trained_on))) + len(case.rows.new)
    before = model.history.get("steps") or [{"method": "train", "caches": [str(trained.get("cache", ""))]}]
    steps = [{**old, "classes": names} for old, names in zip(before, case.past()[0], strict=True)]
    this = {"method": found.method, "when": datetime.now(UTC).isoformat(timespec="seconds"), "caches": list(caches)}
    if growth.new:
        steps.append({"classes": list(growth.new), **this})
    changed = {} if _head_name(model, found) == model.head_name else {"params": _params(found), "chosen": None}
    return {
        **model.history,
        **changed,
        "trained_on": trained,
        "steps": steps,
        "judged": [] if found.judge is None else found.judge.record(found.outcomes[0]),
        "expansions": [
            *(model.history.get("expansions") or []),
            {
                **this,
                "new": list(growth.new),
                "dropped": list(growth.dropped),
                "merged": dict(growth.names),
                "images": len(case.rows.new),
                "request": request,
                "from": model.identity,
                **more,
            },
        ],
    }
