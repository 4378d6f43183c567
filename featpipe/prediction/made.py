"""What a finished file of predictions was made from: a small hidden file beside it, by which the same command knows it.

Names and paths decide nothing. A file of predictions is taken for what would be written now if the models, what was
asked of them, the ids and every image's bytes are the same, and its own bytes are as they were written. Whether an
image's bytes are the same is told by size and time of change or, where those are not, by reading it. Where the hidden
file is lost, images are predicted again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import time_ns
from typing import Any

import joblib
import numpy as np
from numpy.typing import NDArray

import featpipe
from featpipe import trust
from featpipe.archive import Index
from featpipe.cache import narrowed
from featpipe.durable import whole_file
from featpipe.errors import SampleError
from featpipe.extraction import EXTRACTION_VERSION, RACY_NANOSECONDS
from featpipe.fingerprint import digest, digest_arrays, fingerprint
from featpipe.model import Model
from featpipe.prediction.asked import Asked
from featpipe.prediction.files import Columns, columns_of, unfinished_at
from featpipe.progress import Progress, Tell
from featpipe.status import Status

__all__ = ["FORMAT", "Made", "Request", "made_at", "record", "record_of"]

FORMAT = "featpipe-predictions/1"
BYTES_MAX = 2**20


@dataclass(frozen=True)
class Made:
    """What a finished file was made from.

    Attributes
    ----------
    request : str
        Digest of models and what was asked of them.
    ids : str
        Digest of the samples' ids.
    images : str
        Digest of the digests of the images' bytes.
    stamps : str or None
        Digest of what stays the same while the images do; None where it was not to be trusted.
    status : mapping from str to int
        How many samples have which status.
    bytes : int
    sha256 : str
        Of the file.
    """

    request: str
    ids: str
    images: str
    stamps: str | None
    status: Mapping[str, int]
    bytes: int = 0
    sha256: str = ""

    @property
    def is_lasting(self) -> bool:
        """Whether another attempt would find the same: an image that was not there may be there now."""
        return not any(status.word in self.status for status in Status if status.transient)


@dataclass(frozen=True)
class Request:
    """What is to be predicted, by whom.

    Attributes
    ----------
    models : sequence of Model
    columns : sequence of Columns
    index : Index
    asked : Asked
    kind : str
        Of file, as its name ends.
    stamps : str or None
        Digest of what stays the same while the images do; None where one changed so shortly before it was listed that
        it may change again under the same time.
    """

    models: Sequence[Model]
    columns: Sequence[Columns]
    index: Index
    asked: Asked
    kind: str
    stamps: str | None

    @classmethod
    def of(cls, models: Sequence[Model], index: Index, asked: Asked, path: Path) -> Request:
        """Made as soon as the images are listed: then their times are of now."""
        racy = np.any(index.mtime_ns > time_ns() - RACY_NANOSECONDS)
        stamps = None if racy else digest_arrays([("stamps", index.stamps()), ("fault", index.fault)])
        return cls(models, columns_of(models, asked.sets), index, asked, path.suffix.lower(), stamps)

    @property
    def digest(self) -> str:
        """Of the models and what is asked of them."""
        facts = {
            "format": FORMAT,
            "featpipe": featpipe.__version__,
            "models": [_facts(model) for model in self.models],
            "columns": [asdict(columns) for columns in self.columns],
            "embeddings": [EXTRACTION_VERSION, self.asked.storage(self.models[0])],
            "kind": self.kind,
            "top": self.asked.top,
            "sets": self.asked.sets,
        }
        return fingerprint(facts)

    def made(self, images: NDArray[np.uint8], status: Mapping[str, int]) -> Made:
        """What is known when all is predicted, but for the file.

        Parameters
        ----------
        images : ndarray of shape (n, 32), uint8
        status : mapping from str to int
        """
        return Made(self.digest, self.ids, _digest(images), self.stamps, dict(status))

    @property
    def ids(self) -> str:
        ids = self.index.ids
        return digest_arrays([("data", ids.data), ("offsets", ids.offsets)])

    def finished(self, path: Path, progress: Tell) -> Made | None:
        """What a file was made from, if that is this request; None if it is to be made.

        Images are read where their times do not tell, and the record is then brought up to date.
        """
        made = made_at(path)
        if made is None or not made.is_lasting or (made.request, made.ids) != (self.digest, self.ids):
            return None
        if not self.asked.check_content and made.stamps is not None and made.stamps == self.stamps:
            return made
        if made.images != _digest(_read(self.index, progress)):
            return None
        found = replace(made, stamps=self.stamps)
        if found != made:
            with suppress(OSError):  # it is only quicker the next time
                _write(path, found)
        return found


def made_at(path: Path) -> Made | None:
    """What is recorded of a file whose bytes are those that were written; else None."""
    try:
        with open(record_of(path), "rb") as file:
            facts = json.loads(file.read(BYTES_MAX))
        made = Made(**{name: facts[name] for name in Made.__dataclass_fields__})
        if facts["format"] == FORMAT and _sums(path) == (made.bytes, made.sha256):
            return made
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass  # no record, or none of ours: it is made again
    return None


def record(path: Path, made: Made) -> None:
    """Note what a finished file was made from."""
    nbytes, sha256 = _sums(path)
    _write(path, replace(made, bytes=nbytes, sha256=sha256))


def record_of(path: Path) -> Path:
    """Where that is noted: hidden, so that patterns and readers of whole folders pass it by."""
    return path.with_name(f".{path.name}.made.json")


def _write(path: Path, made: Made) -> None:
    with whole_file(record_of(path), text=True, folder=unfinished_at(path)) as file:
        json.dump({"format": FORMAT, **asdict(made)}, file, indent=1)


def _sums(path: Path) -> tuple[int, str]:
    with open(path, "rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _digest(images: NDArray[np.uint8]) -> str:
    return hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()


def _read(index: Index, progress: Tell) -> NDArray[np.uint8]:
    """The digest of each image's bytes, shape (n, 32); zero where they cannot be had."""
    digests = np.zeros((len(index), 32), np.uint8)
    with index.open() as reader:
        for row in range(len(index)):
            with suppress(SampleError):
                digests[row] = np.frombuffer(digest(reader.read(row)), np.uint8)
            progress(Progress("bar", "comparing", row + 1, len(index)))
    return digests


def _facts(model: Model) -> dict[str, Any]:
    """All that decides what a model says of an embedding, and which embeddings those are."""
    calibration = model.calibration
    return {
        "head": joblib.hash(model.head),
        "task": model.task,
        "classes": list(model.classes),
        "output": model.output,
        "backbone": narrowed(model.facts, model.output)["backbone"],
        "precision": model.facts["precision"],
        "calibration": None if calibration is None else calibration.facts(),
        "trust": hashlib.sha256(trust.dumps(model.trust)).hexdigest(),
    }
