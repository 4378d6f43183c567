"""The result of an expansion, and the model that it makes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from featpipe.heads import BayesianRidgeClassifier, get_base_head
from featpipe.incremental.context import ExpansionContext
from featpipe.incremental.dataset import LabeledEmbeddings
from featpipe.incremental.methods import METHODS
from featpipe.incremental.metrics import MethodOutcome
from featpipe.incremental.retention import fit_to_budget, resolve_policy, update_replay_memory
from featpipe.incremental.select_method import HeldOutScores, SelectedMethod, cross_fit_scores, score_halves
from featpipe.metrics import Calibration, Interval
from featpipe.model import STORED_DIGEST_BYTES, ConformalPredictor, Model, NoveltyScorer, Uncertainty
from featpipe.training import EmbeddingDataset, fit_novelty, update_novelty

logger = logging.getLogger(__name__)

N_CURVE_ROWS = 8


@dataclass(frozen=True, eq=False)
class Expansion:
    """A model with more classes, and the effect on old and new ones.

    Attributes
    ----------
    model : Model
    method : str
        The method that made ``model``.
    new, dropped : tuple of str
        Classes.
    merged : dict
        New names of old classes.
    images : dict
        Numbers of images: ``learnt``, given again of those that the model was trained on (``old``), and ``tested``.
    how : str
        The test images, in words.
    before : Interval or None
        Accuracy of the old model on its classes, on the same test rows.
    outcomes : tuple of MethodOutcome
        The selected method first, then those for comparison.
    recommended : str or None
        If all methods were compared.
    unavailable : dict
        Methods that could not be used, with the reason.
    notes : tuple of str
    """

    model: Model
    method: str
    new: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    merged: Mapping[str, str] = field(default_factory=dict)
    images: Mapping[str, int] = field(default_factory=dict)
    how: str = ""
    before: Interval | None = None
    outcomes: tuple[MethodOutcome, ...] = ()
    recommended: str | None = None
    unavailable: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON data, without the model."""
        return {
            "method": self.method,
            "classes": list(self.model.classes),
            "new": list(self.new),
            "dropped": list(self.dropped),
            "merged": dict(self.merged),
            "images": dict(self.images),
            "how": self.how,
            "before": None if self.before is None else {k: _finite_or_none(v) for k, v in vars(self.before).items()},
            "outcomes": [outcome.to_dict() for outcome in self.outcomes],
            "recommended": self.recommended,
            "unavailable": dict(self.unavailable),
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, model: Model, record: Mapping[str, Any]) -> Expansion:
        """From `to_dict`."""
        before = record["before"]
        nan = float("nan")
        return cls(
            model,
            record["method"],
            tuple(record["new"]),
            tuple(record["dropped"]),
            record["merged"],
            record["images"],
            record["how"],
            None if before is None else Interval(*(nan if v is None else v for v in before.values())),
            tuple(MethodOutcome.from_dict(outcome) for outcome in record["outcomes"]),
            record["recommended"],
            record["unavailable"],
            tuple(record["notes"]),
        )

    def as_table(self) -> list[list[str]]:
        """A header, and a row for the old model and for each method."""
        header = ["method", "old classes", "new classes", "all", "forgetting", "backward transfer", "keeps", "seconds"]
        rows = [["before", str(self.before or ""), *[""] * 6]] if self.before is not None else []
        for row in self.outcomes:
            figures = [row.old, row.new, row.all, row.forgetting, row.backward]
            cells = ["" if figure is None else str(figure) for figure in figures]
            rows.append([row.method, *cells, f"{row.bytes / 1e6:.2f} MB", f"{row.seconds:.2f}"])
        return [header, *rows]

    def curve_table(self) -> list[list[str]]:
        """A header, and some epochs of the selected method; empty if it has no epochs."""
        curves = self.outcomes[0].curves if self.outcomes else {}
        if not curves:
            return []
        epochs = curves["epochs"]
        indices = sorted({0, *(2**i for i in range(N_CURVE_ROWS)), len(epochs) - 1} & set(range(len(epochs))))
        names = ["train_loss", "old_loss", "new_loss", "old_accuracy", "new_accuracy"]
        header = ["epoch", *(name.replace("_", " ") for name in names)]
        return [header, *([f"{epochs[i]:.0f}", *(_format_number(curves[name][i]) for name in names)] for i in indices)]


def collect_metrics(outcome: MethodOutcome) -> dict[str, dict[str, float | None]]:
    """The scores of a method, by the names of a model's scores."""
    names = {"accuracy": "all", "old_accuracy": "old", "new_accuracy": "new", "forgetting": "forgetting"}
    intervals = {name: getattr(outcome, attribute) for name, attribute in names.items()}
    return {
        name: {k: _finite_or_none(v) for k, v in vars(value).items()}
        for name, value in intervals.items()
        if value is not None
    }


def _format_number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _finite_or_none(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None


SEPARATE_SHRINKAGE_NOTE = (
    "lda shrinks the covariance of each class by its own rows; for old classes with new images, old and new rows are "
    "shrunk separately, an approximation of training on all rows at once (exact with shrinkage=NUMBER)"
)
BALANCE_NOTE = (
    "old and new classes are balanced: rows that represent old images are weighted accordingly, and an offset between "
    "old and new classes is fitted on held-out rows"
)

NO_PREDICTION_SETS_NOTE = (
    "the model has no prediction sets: they need images of every class that it was not trained on; give them as "
    "--calibration, or all old images with --method joint"
)
DEFAULT_RIDGE_TEMPERATURE = 0.25  # if there are too few rows to fit it; between 0.2 on tiles and 0.3 on emoji


def build_expanded_model(
    context: ExpansionContext, selected: SelectedMethod, caches: Sequence[str], request: str, notes: Sequence[str] = ()
) -> Expansion:
    """The new model, and the result of the expansion.

    Parameters
    ----------
    context : ExpansionContext
    selected : SelectedMethod
    caches : sequence of str
        Names of the caches that were learnt from.
    request : str
        Digest of the request.
    notes : sequence of str
        Put before the notes of this function.
    """
    model, class_mapping, data = context.model, context.class_mapping, context.data
    policy = resolve_policy(
        model.kept, context.policy, context.settings if context.has_explicit_memory else None, selected.method
    )
    replay_memory = update_replay_memory(selected.step, selected.pipeline, policy, retrained=selected.method == "joint")
    if replay_memory is not None and context.budget is not None:
        replay_memory = fit_to_budget(
            replay_memory, context.budget, METHODS[selected.method].memory_part if selected.method in METHODS else ""
        )
    held_out_scores = _score_held_out(context, selected)
    calibration = _fit_calibration(model, selected, held_out_scores)
    trust = Uncertainty(
        _update_novelty(context, selected), _fit_conformal(context, selected, held_out_scores, calibration)
    )
    digests = np.concatenate([model.trained_on, data.new.digests[:, :STORED_DIGEST_BYTES]])
    expanded_model = replace(
        model,
        head=selected.pipeline,
        head_name=_select_head_name(model, selected),
        classes=class_mapping.classes,
        trained_on=np.unique(digests, axis=0),
        calibration=calibration,
        kept=replay_memory,
        trust=trust,
        scores={},
        history=make_history(context, selected, caches, request),
        path=model.path if model._carries_weights else None,  # where its weights are
    )
    return make_expansion(
        context,
        selected,
        expanded_model,
        _describe_evaluation(context, selected),
        [*notes, *_make_notes(context, selected, trust.conformal)],
    )


def make_expansion(
    context: ExpansionContext, selected: SelectedMethod, expanded_model: Model, description: str, notes: Sequence[str]
) -> Expansion:
    """Make the result, and store it in the model's scores."""
    class_mapping, data, evaluator = context.class_mapping, context.data, selected.evaluator
    expansion = Expansion(
        model=expanded_model,
        method=selected.method,
        new=class_mapping.new_classes,
        dropped=class_mapping.dropped,
        merged=dict(class_mapping.renames),
        images={
            "learnt": len(data.new),
            "old": len(data.old),
            "tested": 0 if evaluator is None else len(evaluator.test),
        },
        how=description,
        before=None if evaluator is None else evaluator.make_outcome("before", evaluator.correct_before).old,
        outcomes=selected.outcomes,
        recommended=selected.recommended,
        unavailable=selected.unavailable,
        notes=tuple(notes),
    )
    metrics = collect_metrics(selected.outcomes[0]) if selected.outcomes else {}
    expanded_model.scores["expansion"] = {"how": expansion.how, "metrics": metrics, "result": expansion.to_dict()}
    return expansion


def _describe_evaluation(context: ExpansionContext, selected: SelectedMethod) -> str:
    if selected.evaluator is None:
        return "no test images"
    n, n_given = len(selected.evaluator.test), len(context.data.test)
    if n == n_given:
        return f"{n:,} given test images"
    held_out_text = f"{n - n_given:,} new images, held out and learnt afterwards"
    return f"{n_given:,} given test images and {held_out_text}" if n_given else held_out_text


def _select_head_name(model: Model, selected: SelectedMethod) -> str:
    """The name of the new head: ``statistics`` replaces heads that have no closed form."""
    head = get_base_head(selected.pipeline[-1])
    if type(head) is type(get_base_head(model.head[-1])):
        return model.head_name
    return "ridge" if isinstance(head, BayesianRidgeClassifier) else "lda"


def _score_held_out(context: ExpansionContext, selected: SelectedMethod) -> HeldOutScores:
    """Logits of held-out rows, if temperature or prediction sets need them."""
    step, calibration_rows, old_model = selected.step, context.data.calibration, context.model
    fit = METHODS[selected.method].fit if selected.method in METHODS else None
    if calibration_rows is not None and len(calibration_rows):
        return score_halves(selected.pipeline, calibration_rows, step.k)
    is_joint = selected.method == "joint"
    needs_sets = is_joint and old_model.trust.conformal is not None
    needs_temperature = (
        _needs_temperature(old_model, selected) and selected.method != "frozen-old"
    )  # frozen-old keeps the old temperature
    if fit is None or not (needs_sets or needs_temperature):
        return HeldOutScores((), (), step.k)
    logger.info("calibrating by cross-fitting")
    return cross_fit_scores(step, fit, include_old=is_joint)


def _needs_temperature(model: Model, selected: SelectedMethod) -> bool:
    had_temperature = model.calibration is not None and model.calibration.temperature != 1
    return had_temperature or not hasattr(selected.pipeline, "predict_proba")


def _fit_calibration(model: Model, selected: SelectedMethod, held_out_scores: HeldOutScores) -> Calibration | None:
    """A temperature from held-out rows, else that of the old head; prior corrections were for the old classes."""
    if not _needs_temperature(model, selected):
        return None
    if held_out_scores.temperature is not None:
        return Calibration(held_out_scores.temperature)
    if model.calibration is not None and _select_head_name(model, selected) == model.head_name:
        return Calibration(model.calibration.temperature)
    return None if hasattr(selected.pipeline, "predict_proba") else Calibration(DEFAULT_RIDGE_TEMPERATURE)


def _fit_conformal(
    context: ExpansionContext, selected: SelectedMethod, held_out_scores: HeldOutScores, calibration: Calibration | None
) -> ConformalPredictor | None:
    old_conformal = context.model.trust.conformal
    if len(held_out_scores):
        return held_out_scores.make_conformal(calibrate=calibration is not None)
    # A merged class has at least the probability of each of its parts, so the coverage of the sets does not fall.
    is_regrouping = selected.method == "regroup" and not context.class_mapping.dropped
    return old_conformal if is_regrouping and context.model.calibration == calibration else None


def _update_novelty(context: ExpansionContext, selected: SelectedMethod) -> NoveltyScorer | None:
    """Update the out-of-distribution score with the new images; images of dropped classes stay in distribution."""
    old_novelty, step = context.model.trust.novelty, selected.step
    if old_novelty is None:
        return None
    if selected.method == "joint" and step.has_all_old_rows:
        return fit_novelty(_to_dataset(step.old + step.new, context.class_mapping.classes), "classification")
    return update_novelty(
        old_novelty, len(context.model.trained_on), _to_dataset(step.new, context.class_mapping.classes)
    )


def _to_dataset(embeddings: LabeledEmbeddings, classes: tuple[str, ...]) -> EmbeddingDataset:
    return EmbeddingDataset(np.arange(len(embeddings)), embeddings.X, embeddings.y, classes, embeddings.digests)


def _make_notes(context: ExpansionContext, selected: SelectedMethod, conformal: ConformalPredictor | None) -> list[str]:
    model, class_mapping, notes = context.model, context.class_mapping, []
    if model.calibration is not None and model.calibration.offsets:
        notes.append("the prior correction was for the old classes and is dropped")
    if model.history.get("balance"):
        notes.append("the model was trained on resampled rows; the expansion does not resample")
    if _select_head_name(model, selected) != model.head_name:
        new_name = _select_head_name(model, selected)
        notes.append(f"the head is now {new_name}, since {model.head_name} has no closed form from statistics")
    replay_memory = selected.step.replay_memory
    has_separate_scatter = (
        replay_memory is not None and replay_memory.statistics is not None and replay_memory.statistics.kind == "apart"
    )
    if selected.method == "statistics" and has_separate_scatter and (selected.step.new.y < class_mapping.k_old).any():
        notes.append(SEPARATE_SHRINKAGE_NOTE)
    if selected.method == "statistics" and class_mapping.dropped:
        notes.append("the scatter within classes is reduced by the share of images that dropped classes had")
    if selected.method not in ("joint", "naive", "statistics", "regroup"):
        notes.append(BALANCE_NOTE)
    if context.data.excluded_counts:
        notes.append(
            "left out: " + ", ".join(f"{count:,} {reason}" for reason, count in context.data.excluded_counts.items())
        )
    has_calibration_rows = context.data.calibration is not None and len(context.data.calibration)
    if conformal is None and (has_calibration_rows or model.trust.conformal is not None):
        notes.append(NO_PREDICTION_SETS_NOTE)
    for text in notes:
        logger.info(text)
    return notes


def _head_params(selected: SelectedMethod) -> dict[str, Any]:
    """The settings of a head that replaces another."""
    return {"alpha": "auto"} if isinstance(get_base_head(selected.pipeline[-1]), BayesianRidgeClassifier) else {}


def make_history(
    context: ExpansionContext, selected: SelectedMethod, caches: Sequence[str], request: str, **extra: Any
) -> dict[str, Any]:
    """The model's history with this step; ``extra`` is added to the step's own entry."""
    model, class_mapping = context.model, context.class_mapping
    trained_on = dict(model.history.get("trained_on") or {})
    trained_on["rows"] = int(trained_on.get("rows", len(model.trained_on))) + len(context.data.new)
    old_steps = model.history.get("steps") or [{"method": "train", "caches": [str(trained_on.get("cache", ""))]}]
    steps = [
        {**old_step, "classes": names} for old_step, names in zip(old_steps, context.get_past_steps()[0], strict=True)
    ]
    entry = {"method": selected.method, "when": datetime.now(UTC).isoformat(timespec="seconds"), "caches": list(caches)}
    if class_mapping.new_classes:
        steps.append({"classes": list(class_mapping.new_classes), **entry})
    head_changes = (
        {}
        if _select_head_name(model, selected) == model.head_name
        else {"params": _head_params(selected), "chosen": None}
    )
    return {
        **model.history,
        **head_changes,
        "trained_on": trained_on,
        "steps": steps,
        "judged": [] if selected.evaluator is None else selected.evaluator.make_step_records(selected.outcomes[0]),
        "expansions": [
            *(model.history.get("expansions") or []),
            {
                **entry,
                "new": list(class_mapping.new_classes),
                "dropped": list(class_mapping.dropped),
                "merged": dict(class_mapping.renames),
                "images": len(context.data.new),
                "request": request,
                "from": model.identity,
                **extra,
            },
        ],
    }
