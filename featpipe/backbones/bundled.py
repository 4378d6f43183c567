"""The backbone of a model's file: its name, its transform, and the weights that the file carries.

A model's file is a zip archive, uncompressed. What is read of it here is its ``model.json`` and, where it has one, its
``backbone.safetensors``; neither can run code.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from featpipe.errors import WeightsError

__all__ = ["BundledBackbone", "is_model_file", "read_bundled_backbone", "read_bundled_weights"]

MODEL_JSON, WEIGHTS_FILE = "model.json", "backbone.safetensors"
MAX_MODEL_JSON_BYTES = 64 * 2**20


@dataclass(frozen=True)
class BundledBackbone:
    """What a model's file says of its backbone.

    Attributes
    ----------
    name : str
    weights : str or Path or None
        The file itself, where it carries them; else as the backbone was asked for.
    seed : int
    facts : mapping
    """

    name: str
    weights: str | Path | None
    seed: int
    identity: Mapping[str, Any]


def is_model_file(path: Path) -> bool:
    """Whether a file is a model's."""
    try:
        with zipfile.ZipFile(path) as file:
            return MODEL_JSON in file.namelist()
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError):
        return False


def read_bundled_backbone(path: Path) -> BundledBackbone:
    """What a model's file says of its backbone.

    Raises
    ------
    WeightsError
        If it is damaged.
    """
    try:
        document = _read_model_json(path)
        request, identity = document["backbone"], document["facts"]["backbone"]
        has_weights = WEIGHTS_FILE in document["files"]
        return BundledBackbone(
            str(request["name"]), path if has_weights else request["weights"], int(request.get("seed", 0)), identity
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, zipfile.BadZipFile) as error:
        raise _damaged_error(path, error) from None


def read_bundled_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a model's file.

    Raises
    ------
    WeightsError
        If it carries none, or is damaged.
    """
    import safetensors.torch

    try:
        expected_digest = _read_model_json(path)["files"].get(WEIGHTS_FILE)
        if expected_digest is None:
            raise WeightsError(f"{path}: carries no weights; its backbone has those that it was loaded with")
        with zipfile.ZipFile(path) as file:
            entry = file.getinfo(WEIGHTS_FILE)
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > path.stat().st_size:
                raise ValueError("its weights are packed")
            data = file.read(entry)
        if hashlib.sha256(data).hexdigest() != expected_digest:
            raise ValueError("the digest of its weights is not the one that it names")
        return safetensors.torch.load(data)
    except WeightsError:
        raise
    except Exception as error:  # zipfile, json and safetensors each have errors of their own for damaged bytes
        raise _damaged_error(path, error) from None


def _read_model_json(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as file:
        entry = file.getinfo(MODEL_JSON)
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > min(
            MAX_MODEL_JSON_BYTES, path.stat().st_size
        ):
            raise ValueError(f"its {MODEL_JSON} is packed or too large")
        document = json.loads(file.read(entry))
    if not isinstance(document, dict) or not isinstance(document.get("files"), dict):
        raise ValueError(f"its {MODEL_JSON} names no files")
    return document


def _damaged_error(path: Path, error: BaseException) -> WeightsError:
    reason = " ".join(str(error).split())[:200]
    return WeightsError(f"{path}: is damaged or no featpipe model ({type(error).__name__}: {reason}); copy it again")
