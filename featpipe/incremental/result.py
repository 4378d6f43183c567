"""The result of an expansion, and the model that it makes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from featpipe.heads import BayesianRidgeClassifier, get_base_head
from featpipe.incremental.calibration import calibrate
from featpipe.incremental.context import ExpansionContext
from featpipe.incremental.methods import METHODS
from featpipe.incremental.metrics import MethodOutcome, read_interval
from featpipe.incremental.retention import fit_to_budget, update_replay_memory
from featpipe.incremental.select_method import SelectedMethod
from featpipe.metrics import Interval, Note, format_note, format_protocol
from featpipe.model import STORED_DIGEST_BYTES, ConformalPredictor, Model
from featpipe.runtime import nan_to_none

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
        Numbers of images: new ones trained on (``learnt``), given ones that the old model was trained on (``old``), and
        test images (``tested``).
    protocol : mapping or str
        The test images, see :func:`featpipe.metrics.format_protocol`.
    before : Interval or None
        Accuracy of the old model on its classes, on the same test rows.
    outcomes : tuple of MethodOutcome
        The selected method first, then those for comparison.
    recommended : str or None
        If all methods were compared.
    missing_requirements : mapping from method to mapping
        Why methods could not be used, see :func:`featpipe.metrics.format_note`; text in earlier files.
    remarks : tuple of mappings
        See :func:`featpipe.metrics.format_note`; text in earlier files.
    """

    model: Model
    method: str
    new: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    merged: Mapping[str, str] = field(default_factory=dict)
    images: Mapping[str, int] = field(default_factory=dict)
    protocol: Mapping[str, Any] | str = ""
    before: Interval | None = None
    outcomes: tuple[MethodOutcome, ...] = ()
    recommended: str | None = None
    missing_requirements: Mapping[str, Note | str] = field(default_factory=dict)
    remarks: tuple[Note | str, ...] = ()

    @property
    def unavailable(self) -> dict[str, str]:
        """Methods that could not be used, with the reason as text."""
        return {method: format_note(reason) for method, reason in self.missing_requirements.items()}

    @property
    def notes(self) -> tuple[str, ...]:
        """The remarks as text."""
        return tuple(map(format_note, self.remarks))

    @property
    def how(self) -> str:
        """A description of the test images."""
        return format_protocol(self.protocol)

    def to_dict(self) -> dict[str, Any]:
        """JSON data, without the model."""
        return {
            "method": self.method,
            "classes": list(self.model.classes),
            "new": list(self.new),
            "dropped": list(self.dropped),
            "merged": dict(self.merged),
            "images": dict(self.images),
            "how": self.protocol,
            "before": None if self.before is None else nan_to_none(vars(self.before)),
            "outcomes": [outcome.to_dict() for outcome in self.outcomes],
            "recommended": self.recommended,
            "unavailable": dict(self.missing_requirements),
            "notes": list(self.remarks),
        }

    @classmethod
    def from_dict(cls, model: Model, record: Mapping[str, Any]) -> Expansion:
        """From `to_dict`."""
        return cls(
            model,
            record["method"],
            tuple(record["new"]),
            tuple(record["dropped"]),
            record["merged"],
            record["images"],
            record["how"],
            read_interval(record["before"]),
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
    return {name: nan_to_none(vars(interval)) for name, interval in intervals.items() if interval is not None}


def _format_number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def build_expanded_model(
    context: ExpansionContext,
    selected: SelectedMethod,
    caches: Sequence[str],
    request: str,
    remarks: Sequence[Note] = (),
) -> Expansion:
    """The new model, and the result of the expansion.

    Parameters
    ----------
    context : ExpansionContext
    selected : SelectedMethod
    caches : sequence of str
        Names of the caches with the training images.
    request : str
        Digest of the request.
    remarks : sequence of mappings
        Put before the remarks of this function.
    """
    model, method, policy = context.model, selected.method, context.resolve_policy(selected.method)
    memory = update_replay_memory(selected.step, selected.pipeline, policy, retrained=method == "joint")
    if memory is not None and context.budget is not None:
        priority = METHODS[method].memory_part if method in METHODS else ""
        memory = fit_to_budget(memory, context.budget, priority)
    calibration, uncertainty = calibrate(context, selected)
    new_digests = context.data.new.digests[:, :STORED_DIGEST_BYTES]
    expanded_model = replace(
        model,
        head=selected.pipeline,
        head_name=selected.get_head_name(model),
        classes=context.class_mapping.classes,
        trained_on=np.unique(np.concatenate([model.trained_on, new_digests]), axis=0),
        calibration=calibration,
        kept=memory,
        trust=uncertainty,
        scores={},
        history=make_history(context, selected, caches, request),
        path=model.path if model._carries_weights else None,  # the file with its weights
    )
    remarks = [*remarks, *_make_remarks(context, selected, uncertainty.conformal)]
    return make_expansion(context, selected, expanded_model, _make_protocol(context, selected), remarks)


def make_expansion(
    context: ExpansionContext, selected: SelectedMethod, model: Model, protocol: dict[str, Any], remarks: Sequence[Note]
) -> Expansion:
    """Make the result, and store it in the model's scores."""
    class_mapping, data, evaluator = context.class_mapping, context.data, selected.evaluator
    n_tested = 0 if evaluator is None else len(evaluator.test)
    expansion = Expansion(
        model=model,
        method=selected.method,
        new=class_mapping.new_classes,
        dropped=class_mapping.dropped,
        merged=dict(class_mapping.renames),
        images={"learnt": len(data.new), "old": len(data.old), "tested": n_tested},
        protocol=protocol,
        before=None if evaluator is None else evaluator.make_outcome("before", evaluator.correct_before).old,
        outcomes=selected.outcomes,
        recommended=selected.recommended,
        missing_requirements=selected.unavailable,
        remarks=tuple(remarks),
    )
    metrics = collect_metrics(selected.outcomes[0]) if selected.outcomes else {}
    model.scores["expansion"] = {"how": protocol, "metrics": metrics, "result": expansion.to_dict()}
    return expansion


def _make_protocol(context: ExpansionContext, selected: SelectedMethod) -> dict[str, Any]:
    if selected.evaluator is None:
        return {"kind": "none"}
    n_given, n = len(context.data.test), len(selected.evaluator.test)
    if n == n_given:
        return {"kind": "given", "n": n}
    if n_given:
        return {"kind": "given_and_new_holdout", "given": n_given, "n": n - n_given}
    return {"kind": "new_holdout", "n": n}


def _make_remarks(
    context: ExpansionContext, selected: SelectedMethod, conformal: ConformalPredictor | None
) -> list[Note]:
    model, class_mapping, data = context.model, context.class_mapping, context.data
    remarks: list[Note] = []
    if model.calibration is not None and model.calibration.offsets:
        remarks.append({"kind": "prior_dropped"})
    if model.history.get("balance"):
        remarks.append({"kind": "not_resampled"})
    if (head_name := selected.get_head_name(model)) != model.head_name:
        remarks.append({"kind": "head_changed", "head": head_name, "old_head": model.head_name})
    if selected.method == "statistics":
        statistics = getattr(selected.step.replay_memory, "statistics", None)
        if statistics is not None and statistics.kind == "apart" and (data.new.y < class_mapping.k_old).any():
            remarks.append({"kind": "separate_shrinkage"})
        if class_mapping.dropped:
            remarks.append({"kind": "scatter_reduced"})
    if selected.method not in ("joint", "naive", "statistics", "regroup"):
        remarks.append({"kind": "balanced"})
    if data.excluded_counts:
        remarks.append({"kind": "left_out", "counts": dict(data.excluded_counts)})
    if conformal is None and (len(data.calibration) or model.trust.conformal is not None):
        remarks.append({"kind": "no_prediction_sets"})
    for remark in remarks:
        logger.info(format_note(remark))
    return remarks


def make_history(
    context: ExpansionContext, selected: SelectedMethod, caches: Sequence[str], request: str, **extra: Any
) -> dict[str, Any]:
    """The model's history with this step; ``extra`` is added to the step's own entry."""
    model, class_mapping, n_new = context.model, context.class_mapping, len(context.data.new)
    trained_on = dict(model.history.get("trained_on") or {})
    trained_on["rows"] = int(trained_on.get("rows", len(model.trained_on))) + n_new
    old_steps = model.history.get("steps") or [{"method": "train", "caches": [str(trained_on.get("cache", ""))]}]
    past_classes, _ = context.get_past_steps()
    steps = [{**old_step, "classes": names} for old_step, names in zip(old_steps, past_classes, strict=True)]
    entry = {"method": selected.method, "when": datetime.now(UTC).isoformat(timespec="seconds"), "caches": list(caches)}
    if class_mapping.new_classes:
        steps.append({"classes": list(class_mapping.new_classes), **entry})
    head_changes: dict[str, Any] = {}
    if selected.get_head_name(model) != model.head_name:
        is_ridge = isinstance(get_base_head(selected.pipeline[-1]), BayesianRidgeClassifier)
        head_changes = {"params": {"alpha": "auto"} if is_ridge else {}, "chosen": None}
    expansion = {
        **entry,
        "new": list(class_mapping.new_classes),
        "dropped": list(class_mapping.dropped),
        "merged": dict(class_mapping.renames),
        "images": n_new,
        "request": request,
        "from": model.identity,
        **extra,
    }
    return {
        **model.history,
        **head_changes,
        "trained_on": trained_on,
        "steps": steps,
        "judged": [] if selected.evaluator is None else selected.evaluator.make_step_records(selected.outcomes[0]),
        "expansions": [*(model.history.get("expansions") or []), expansion],
    }
