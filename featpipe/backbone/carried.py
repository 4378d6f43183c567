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

__all__ = ["Carried", "carried_by", "is_model", "read_carried"]

DOCUMENT, WEIGHTS = "model.json", "backbone.safetensors"
DOCUMENT_BYTES_MAX = 64 * 2**20


@dataclass(frozen=True)
class Carried:
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
    facts: Mapping[str, Any]


def is_model(path: Path) -> bool:
    """Whether a file is a model's."""
    try:
        with zipfile.ZipFile(path) as file:
            return DOCUMENT in file.namelist()
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError):
        return False


def carried_by(path: Path) -> Carried:
    """What a model's file says of its backbone.

    Raises
    ------
    WeightsError
        If it is damaged.
    """
    try:
        document = _document(path)
        request, facts = document["backbone"], document["facts"]["backbone"]
        own = WEIGHTS in document["files"]
        return Carried(str(request["name"]), path if own else request["weights"], int(request.get("seed", 0)), facts)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from None


def read_carried(path: Path) -> dict[str, Tensor]:
    """The weights in a model's file.

    Raises
    ------
    WeightsError
        If it carries none, or is damaged.
    """
    import safetensors.torch

    try:
        wanted = _document(path)["files"].get(WEIGHTS)
        if wanted is None:
            raise WeightsError(f"{path}: carries no weights; its backbone has those that it was loaded with")
        with zipfile.ZipFile(path) as file:
            info = file.getinfo(WEIGHTS)
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > path.stat().st_size:
                raise ValueError("its weights are packed")
            data = file.read(info)
        if hashlib.sha256(data).hexdigest() != wanted:
            raise ValueError("the digest of its weights is not the one that it names")
        return safetensors.torch.load(data)
    except WeightsError:
        raise
    except Exception as error:  # zipfile, json and safetensors each have errors of their own for damaged bytes
        raise _damaged(path, error) from None


def _document(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as file:
        info = file.getinfo(DOCUMENT)
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > min(DOCUMENT_BYTES_MAX, path.stat().st_size):
            raise ValueError(f"its {DOCUMENT} is packed or too large")
        document = json.loads(file.read(info))
    if not isinstance(document, dict) or not isinstance(document.get("files"), dict):
        raise ValueError(f"its {DOCUMENT} names no files")
    return document


def _damaged(path: Path, error: BaseException) -> WeightsError:
    reason = " ".join(str(error).split())[:200]
    return WeightsError(f"{path}: is damaged or no featpipe model ({type(error).__name__}: {reason}); copy it again")
