"""The model file: a validated JSON document and binary members in one zip archive. Reading it cannot run code.

The archive is uncompressed. It holds ``model.json``, ``head.skops`` and ``trained_on.bin``, and optionally
``kept.safetensors`` (the replay memory: retained training data), ``trust.safetensors`` (uncertainty: statistics of
held-out samples) and ``backbone.safetensors`` (the weights). ``model.json`` lists the SHA-256 of the other members.

The format is defined here and not in ``featpipe.model``, because backbones, a layer below models, read their weights
from it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featpipe.errors import ModelError
from featpipe.storage.atomic import atomic_write, check_writable

MODEL_FORMAT = "featpipe-model"
MODEL_FORMAT_VERSION = "1.2"  # 1.1 added the calibration; 1.2 the replay memory and the uncertainty
DOCUMENT_MEMBER, HEAD_MEMBER, TRAINED_ON_MEMBER = "model.json", "head.skops", "trained_on.bin"
REPLAY_MEMORY_MEMBER, UNCERTAINTY_MEMBER = "kept.safetensors", "trust.safetensors"
WEIGHTS_MEMBER = "backbone.safetensors"
MAX_REQUIRED_MEMBER_BYTES = {DOCUMENT_MEMBER: 64 * 2**20, HEAD_MEMBER: 8 * 2**30, TRAINED_ON_MEMBER: 8 * 2**30}
MAX_OPTIONAL_MEMBER_BYTES = {REPLAY_MEMORY_MEMBER: 8 * 2**30, UNCERTAINTY_MEMBER: 2**30}
DOCUMENT_TYPES = {  # required keys of model.json, besides format and version
    "head": str,
    "task": str,
    "classes": list,
    "output": str,
    "facts": dict,
    "backbone": dict,
    "scores": dict,
    "history": dict,
    "files": dict,
}


@dataclass(frozen=True)
class ModelBundle:
    """The content of a model file.

    Attributes
    ----------
    document : dict
        ``model.json``. :meth:`write` adds ``format``, ``format_version`` and ``files``.
    members : mapping from name to bytes
        The members that were read, or that :meth:`write` will write.
    """

    document: dict[str, Any]
    members: Mapping[str, bytes]

    @classmethod
    def read(cls, path: str | os.PathLike[str], members: Iterable[str] = ()) -> ModelBundle:
        """Read and validate the document, and those of the named members that the file has.

        Raises
        ------
        ModelError
            If the file is missing, damaged, or not a model file.
        """
        with convert_bundle_errors(path), zipfile.ZipFile(path) as file:
            infos = {info.filename: info for info in file.infolist()}
            _check_members(infos, len(file.infolist()), Path(path).stat().st_size)
            document = json.loads(file.read(DOCUMENT_MEMBER))
            _check_document(document)
            missing_members = sorted(document["files"].keys() - infos.keys())
            if missing_members:
                raise ModelError(f"has no {missing_members[0][:60]}, which its model.json names; copy the model again")
            if infos.keys() != {DOCUMENT_MEMBER, *document["files"]}:
                raise ModelError("has members that its model.json does not name")
            data_by_name = {name: file.read(name) for name in members if name in infos}
            for name, data in data_by_name.items():
                if hashlib.sha256(data).hexdigest() != document["files"][name]:
                    raise ModelError(f"{name} is damaged: its digest differs from model.json; copy the model again")
            return cls(document, data_by_name)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the file atomically, replacing an existing one.

        Raises
        ------
        ModelError
            If it cannot be written.
        """
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in self.members.items()}
        document = {
            "format": MODEL_FORMAT,
            "format_version": MODEL_FORMAT_VERSION,
            **self.document,
            "files": digests,
        }
        try:
            with atomic_write(Path(path)) as handle, zipfile.ZipFile(handle, "w", zipfile.ZIP_STORED) as file:
                text = json.dumps(document, ensure_ascii=False, allow_nan=False)
                file.writestr(zipfile.ZipInfo(DOCUMENT_MEMBER), text.encode("utf-8", "backslashreplace"))
                for name, data in self.members.items():
                    file.writestr(zipfile.ZipInfo(name), data)
        except OSError as error:
            raise _make_write_error(path, error) from None

    @staticmethod
    def check_target(path: str | os.PathLike[str]) -> None:
        """Check that :meth:`write` can write to a path.

        Raises
        ------
        ModelError
        """
        try:
            check_writable(Path(path))
        except OSError as error:
            raise _make_write_error(path, error) from None

    @property
    def has_weights(self) -> bool:
        """Whether the file contains the weights of the backbone."""
        return WEIGHTS_MEMBER in self.document["files"]


def is_model_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file looks like a model file. Its content is not validated."""
    try:
        with zipfile.ZipFile(path) as file:
            return DOCUMENT_MEMBER in file.namelist()
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError):
        return False


@contextlib.contextmanager
def convert_bundle_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Convert every error caused by a damaged or hostile file into a ModelError that names the file."""
    try:
        yield
    except ModelError as error:
        raise ModelError(str(error) if str(error).startswith(f"{path}: ") else f"{path}: {error}") from None
    except FileNotFoundError:
        raise ModelError(
            f"{path}: there is no such model file; `featpipe train` makes one and prints its path"
        ) from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error}); expected a model file") from None
    # RuntimeError: encrypted members, or JSON nested too deeply
    except (ValueError, LookupError, TypeError, AttributeError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ModelError(
            f"{path}: is damaged or not a featpipe model ({reason}); copy it again, or train again"
        ) from None


def _make_write_error(path: str | os.PathLike[str], error: OSError) -> ModelError:
    return ModelError(f"{path}: cannot be written ({error.strerror or error}); choose another --out")


def _check_members(infos: Mapping[str, zipfile.ZipInfo], member_count: int, file_size: int) -> None:
    max_bytes_by_name = {**MAX_REQUIRED_MEMBER_BYTES, **MAX_OPTIONAL_MEMBER_BYTES, WEIGHTS_MEMBER: file_size}
    unknown_members = sorted(infos.keys() - max_bytes_by_name.keys())
    if unknown_members or len(infos) != member_count:
        problem = ", ".join(map(repr, unknown_members[:3])) or "a member twice"
        raise ModelError(f"holds {problem}, which is not allowed in a model")
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos.values()):
        raise ModelError("holds compressed members, which is not allowed in a model")
    for name in MAX_REQUIRED_MEMBER_BYTES:
        if name not in infos:
            raise ModelError(f"has no {name}; it is not a featpipe model")
    for name, info in infos.items():
        if info.file_size > min(max_bytes_by_name[name], file_size):
            raise ModelError(f"{name} declares {info.file_size} bytes, more than a model may contain")


def _check_document(document: Any) -> None:
    """Check the types of all values used later, so that no command fails halfway."""
    if not isinstance(document, dict) or document.get("format") != MODEL_FORMAT:
        raise ModelError(f"model.json is not of format {MODEL_FORMAT}; it is not a featpipe model")
    version = str(document.get("format_version"))
    if version.split(".")[0] != MODEL_FORMAT_VERSION.split(".")[0]:
        raise ModelError(
            f"has format version {version[:20]}, this featpipe reads {MODEL_FORMAT_VERSION.split('.')[0]}.x"
        )
    for key, expected_type in DOCUMENT_TYPES.items():
        if not isinstance(document.get(key), expected_type):
            raise ModelError(f"model.json has no {key}, or not as a {expected_type.__name__}; copy the model again")
    classes, facts, request = document["classes"], document["facts"], document["backbone"]
    if not all(isinstance(name, str) for name in classes) or len(set(classes)) != len(classes):
        raise ModelError("model.json names a class twice, or not as text; train the model again")
    if not isinstance(request.get("name"), str):
        raise ModelError("model.json names no backbone; train the model again")
    if not isinstance(request.get("weights"), str | None) or not isinstance(request.get("seed", 0), int):
        raise ModelError("model.json does not say which weights its backbone has; train the model again")
    backbone = facts.get("backbone")
    if not isinstance(backbone, dict) or document["output"] not in dict(backbone["outputs"]):
        raise ModelError("model.json does not say what its output is; train the model again")
    _check_retained_data(document.get("kept"), document["history"].get("steps", []))
    if not {"precision", "storage"} <= facts.keys() or not isinstance(backbone["transform"], dict):
        raise ModelError("model.json does not say how the images were embedded; train the model again")


def _check_retained_data(summary: Any, steps: Any) -> None:
    """Check the summary of the replay memory, and the steps in which classes were added."""
    if summary is not None:
        sizes = summary.get("bytes") if isinstance(summary, dict) else None
        numbers = (
            [*sizes.values(), summary.get("rows"), summary.get("rows_a_class")] if isinstance(sizes, dict) else [None]
        )
        if not all(isinstance(number, int) for number in numbers):
            raise ModelError("model.json does not say how large its retained data are; copy the model again")
    are_steps_valid = isinstance(steps, list) and all(isinstance(step, dict) for step in steps)
    if not are_steps_valid or not all(isinstance(step.get("classes"), list) and "method" in step for step in steps):
        raise ModelError("model.json does not say which classes were added in which step; train the model again")
