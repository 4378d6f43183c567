"""What a run has done already, known by content: a record beside each result says what it was made from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from featpipe.durable import whole_file
from featpipe.fingerprint import fingerprint
from featpipe.pipeline.trials import Trial
from featpipe.recipe import Recipe

__all__ = ["Records", "facts_of_model", "versions"]

PACKAGES = ("featpipe", "numpy", "scipy", "scikit-learn", "torch", "torchvision", "timm")


def versions() -> dict[str, str]:
    """The packages whose code decides the figures."""
    return {name: version(name) for name in PACKAGES}


def facts_of_model(recipe: Recipe, trial: Trial, cache: str, rows: str) -> dict[str, Any]:
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
    return {"cache": cache, "rows": rows, "head": head, "training": training, "draws": draws, "versions": versions()}


class Records:
    """The records in a run's folder.

    Parameters
    ----------
    folder : Path
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, name: str, facts: Any, file: Path | None = None) -> dict[str, Any] | None:
        """What was recorded under a name, if it was made from these facts and its file is as it was written."""
        try:
            record = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
            same = record["made_from"] == fingerprint(_plain(facts))
            if not same or (file is not None and record["sha256"] != _digest_of(file)):
                return None
            found: dict[str, Any] = record["found"]
        except (OSError, ValueError, LookupError, TypeError):  # torn, or nobody's
            return None
        return found

    def write(self, name: str, facts: Any, found: dict[str, Any], file: Path | None = None) -> None:
        """Record what was found, once its file is complete."""
        digest = None if file is None else _digest_of(file)
        record = {"made_from": fingerprint(_plain(facts)), "facts": _plain(facts), "sha256": digest, "found": found}
        with whole_file(self.folder / f"{name}.json", text=True) as out:
            json.dump(record, out, indent=1, ensure_ascii=False)


def _digest_of(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _plain(value: Any) -> Any:
    """As JSON gives it back; by its own words what JSON cannot hold."""
    return json.loads(json.dumps(value, default=repr))
