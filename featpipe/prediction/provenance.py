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
from featpipe.cache import restrict_facts_to_output
from featpipe.data import Index
from featpipe.errors import SampleError
from featpipe.extraction import EXTRACTION_VERSION
from featpipe.model import Model, dumps
from featpipe.prediction.config import PredictConfig
from featpipe.prediction.writers import PredictionColumns, find_parts_directory, make_columns
from featpipe.runtime import Progress, ProgressCallback
from featpipe.status import Status
from featpipe.storage import RACY_NANOSECONDS, atomic_write, compute_fingerprint, digest, digest_arrays

__all__ = ["RECEIPT_FORMAT", "PredictionRequest", "Receipt", "read_receipt", "receipt_path", "write_receipt"]

RECEIPT_FORMAT = "featpipe-predictions/1"
MAX_RECEIPT_BYTES = 2**20


@dataclass(frozen=True)
class Receipt:
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
    def is_deterministic(self) -> bool:
        """Whether another attempt would find the same: an image that was not there may be there now."""
        return not any(status.word in self.status for status in Status if status.transient)


@dataclass(frozen=True)
class PredictionRequest:
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
    columns: Sequence[PredictionColumns]
    index: Index
    config: PredictConfig
    file_suffix: str
    stamps: str | None

    @classmethod
    def create(cls, models: Sequence[Model], index: Index, config: PredictConfig, path: Path) -> PredictionRequest:
        """Made as soon as the images are listed: then their times are of now."""
        has_racy_mtime = np.any(index.mtime_ns > time_ns() - RACY_NANOSECONDS)
        stamps = None if has_racy_mtime else digest_arrays([("stamps", index.compute_stamps()), ("fault", index.fault)])
        return cls(models, make_columns(models, config.sets), index, config, path.suffix.lower(), stamps)

    @property
    def digest(self) -> str:
        """Of the models and what is asked of them."""
        identity = {
            "format": RECEIPT_FORMAT,
            "featpipe": featpipe.__version__,
            "models": [_model_identity(model) for model in self.models],
            "columns": [asdict(columns) for columns in self.columns],
            "embeddings": [EXTRACTION_VERSION, self.config.embedding_dtype(self.models[0])],
            "kind": self.file_suffix,
            "top": self.config.top,
            "sets": self.config.sets,
        }
        return compute_fingerprint(identity)

    def make_receipt(self, image_digests: NDArray[np.uint8], status: Mapping[str, int]) -> Receipt:
        """What is known when all is predicted, but for the file.

        Parameters
        ----------
        images : ndarray of shape (n, 32), uint8
        status : mapping from str to int
        """
        return Receipt(self.digest, self.ids, _hash_image_digests(image_digests), self.stamps, dict(status))

    @property
    def ids(self) -> str:
        ids = self.index.ids
        return digest_arrays([("data", ids.data), ("offsets", ids.offsets)])

    def find_current_receipt(self, path: Path, progress: ProgressCallback) -> Receipt | None:
        """What a file was made from, if that is this request; None if it is to be made.

        Images are read where their times do not tell, and the record is then brought up to date.
        """
        receipt = read_receipt(path)
        if receipt is None or not receipt.is_deterministic or (receipt.request, receipt.ids) != (self.digest, self.ids):
            return None
        if not self.config.check_content and receipt.stamps is not None and receipt.stamps == self.stamps:
            return receipt
        if receipt.images != _hash_image_digests(_hash_images(self.index, progress)):
            return None
        updated_receipt = replace(receipt, stamps=self.stamps)
        if updated_receipt != receipt:
            with suppress(OSError):  # it is only quicker the next time
                _dump_receipt(path, updated_receipt)
        return updated_receipt


def read_receipt(path: Path) -> Receipt | None:
    """What is recorded of a file whose bytes are those that were written; else None."""
    try:
        with open(receipt_path(path), "rb") as file:
            document = json.loads(file.read(MAX_RECEIPT_BYTES))
        receipt = Receipt(**{name: document[name] for name in Receipt.__dataclass_fields__})
        if document["format"] == RECEIPT_FORMAT and _size_and_sha256(path) == (receipt.bytes, receipt.sha256):
            return receipt
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass  # no record, or none of ours: it is made again
    return None


def write_receipt(path: Path, receipt: Receipt) -> None:
    """Note what a finished file was made from."""
    nbytes, sha256 = _size_and_sha256(path)
    _dump_receipt(path, replace(receipt, bytes=nbytes, sha256=sha256))


def receipt_path(path: Path) -> Path:
    """Where that is noted: hidden, so that patterns and readers of whole folders pass it by."""
    return path.with_name(f".{path.name}.made.json")


def _dump_receipt(path: Path, receipt: Receipt) -> None:
    with atomic_write(receipt_path(path), text=True, folder=find_parts_directory(path)) as file:
        json.dump({"format": RECEIPT_FORMAT, **asdict(receipt)}, file, indent=1)


def _size_and_sha256(path: Path) -> tuple[int, str]:
    with open(path, "rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _hash_image_digests(image_digests: NDArray[np.uint8]) -> str:
    return hashlib.sha256(np.ascontiguousarray(image_digests).data).hexdigest()


def _hash_images(index: Index, progress: ProgressCallback) -> NDArray[np.uint8]:
    """The digest of each image's bytes, shape (n, 32); zero where they cannot be had."""
    digests = np.zeros((len(index), 32), np.uint8)
    with index.open() as reader:
        for row in range(len(index)):
            with suppress(SampleError):
                digests[row] = np.frombuffer(digest(reader.read(row)), np.uint8)
            progress(Progress("bar", "comparing", row + 1, len(index)))
    return digests


def _model_identity(model: Model) -> dict[str, Any]:
    """All that decides what a model says of an embedding, and which embeddings those are."""
    calibration = model.calibration
    return {
        "head": joblib.hash(model.head),
        "task": model.task,
        "classes": list(model.classes),
        "output": model.output,
        "backbone": restrict_facts_to_output(model.facts, model.output)["backbone"],
        "precision": model.facts["precision"],
        "calibration": None if calibration is None else calibration.to_dict(),
        "trust": hashlib.sha256(dumps(model.trust)).hexdigest(),
    }
