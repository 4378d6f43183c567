"""What a run has done already, known by content: a record beside each result says what it was made from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from featpipe.durable import atomic_write
from featpipe.fingerprint import compute_fingerprint
from featpipe.pipeline.trials import TrialSpec
from featpipe.recipe import Recipe

__all__ = ["RecordStore", "get_package_versions", "make_model_inputs"]

VERSIONED_PACKAGES = ("featpipe", "numpy", "scipy", "scikit-learn", "torch", "torchvision", "timm")


def get_package_versions() -> dict[str, str]:
    """The packages whose code decides the figures."""
    return {name: version(name) for name in VERSIONED_PACKAGES}


def make_model_inputs(recipe: Recipe, trial: TrialSpec, cache_fingerprint: str, rows_digest: str) -> dict[str, Any]:
    """What decides a trained model: embeddings, rows, head, settings, seeds and versions.

    Parameters
    ----------
    recipe : Recipe
    trial : Trial
    cache : str
        The fingerprint of the cache.
    rows : str
        The digest of the training rows and their labels.
    """
    head, training = asdict(trial.head), asdict(recipe.training)
    del head["table"], training["jobs"], training["portable"]  # neither changes a number
    draws = None if trial.per_class is None else [trial.per_class, recipe.split.draws, recipe.split.seed]
    return {
        "cache": cache_fingerprint,
        "rows": rows_digest,
        "head": head,
        "training": training,
        "draws": draws,
        "versions": get_package_versions(),
    }


class RecordStore:
    """The records in a run's folder.

    Parameters
    ----------
    folder : Path
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, name: str, inputs: Any, file: Path | None = None) -> dict[str, Any] | None:
        """What was recorded under a name, if it was made from these facts and its file is as it was written."""
        try:
            record = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
            is_current = record["made_from"] == compute_fingerprint(_to_json_value(inputs))
            if not is_current or (file is not None and record["sha256"] != _compute_sha256(file)):
                return None
            outcome: dict[str, Any] = record["found"]
        except (OSError, ValueError, LookupError, TypeError):  # torn, or nobody's
            return None
        return outcome

    def write(self, name: str, inputs: Any, outcome: dict[str, Any], file: Path | None = None) -> None:
        """Record what was found, once its file is complete."""
        digest = None if file is None else _compute_sha256(file)
        record = {
            "made_from": compute_fingerprint(_to_json_value(inputs)),
            "facts": _to_json_value(inputs),
            "sha256": digest,
            "found": outcome,
        }
        with atomic_write(self.folder / f"{name}.json", text=True) as out:
            json.dump(record, out, indent=1, ensure_ascii=False)


def _compute_sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _to_json_value(value: Any) -> Any:
    """As JSON gives it back; by its own words what JSON cannot hold."""
    return json.loads(json.dumps(value, default=repr))
