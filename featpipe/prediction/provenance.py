"""The receipt of a finished file of predictions: a small hidden file beside it, by which finished work is reused.

Names and paths decide nothing. A file of predictions is current if the models, the options, the ids and every image's
bytes are the same, and the file has the bytes that were written. Unchanged images are recognised by size and
modification time; where these differ, the bytes are read. Without a receipt, images are predicted again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from time import time_ns
from typing import TYPE_CHECKING, Any

import joblib
import numpy as np
from numpy.typing import NDArray

from featpipe.cache import restrict_facts_to_output
from featpipe.data import Index
from featpipe.errors import SampleError
from featpipe.extraction import EXTRACTION_VERSION
from featpipe.model import dumps
from featpipe.prediction.config import PredictConfig
from featpipe.prediction.writers import PredictionColumns, find_parts_directory, make_columns
from featpipe.runtime import Progress, ProgressCallback
from featpipe.status import Status
from featpipe.storage import (
    RACY_NANOSECONDS,
    Receipt,
    atomic_write,
    compute_fingerprint,
    digest,
    digest_arrays,
    hash_file,
)

if TYPE_CHECKING:
    from featpipe.model import Model

RECEIPT_FORMAT = "featpipe-predictions/1"
MAX_RECEIPT_BYTES = 2**20


@dataclass(frozen=True)
class PredictionReceipt:
    """The receipt of a file of predictions, as it is stored.

    Attributes
    ----------
    request : str
        Digest of the models and the options.
    ids : str
        Digest of the samples' ids.
    images : str
        Digest of the digests of the images' bytes.
    stamps : str or None
        Digest of the images' sizes and modification times; None if an image had changed too recently.
    status : mapping from str to int
        Number of samples by status.
    bytes : int
        Size of the file.
    sha256 : str
        Digest of the file.
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
        """Whether another attempt would give the same: an image with a transient status may be readable now."""
        return not any(status.word in self.status for status in Status if status.transient)

    def to_receipt(self) -> Receipt:
        return Receipt(self.request, _combine_inputs(self.ids, self.images), self.sha256, self.bytes)


@dataclass(frozen=True)
class PredictionRequest:
    """A request for predictions, and the digests that identify it.

    Attributes
    ----------
    models : sequence of Model
    columns : sequence of PredictionColumns
    index : Index
    config : PredictConfig
    file_suffix : str
        Decides the file format.
    stamps : str or None
        Digest of the images' sizes and modification times; None if an image changed so recently that it may change
        again under the same time.
    """

    models: Sequence[Model]
    columns: Sequence[PredictionColumns]
    index: Index
    config: PredictConfig
    file_suffix: str
    stamps: str | None

    @classmethod
    def create(cls, models: Sequence[Model], index: Index, config: PredictConfig, path: Path) -> PredictionRequest:
        """Call it as soon as the images are listed: it compares their times with the clock."""
        has_racy_mtime = np.any(index.mtime_ns > time_ns() - RACY_NANOSECONDS)
        stamps = None if has_racy_mtime else digest_arrays([("stamps", index.compute_stamps()), ("fault", index.fault)])
        return cls(models, make_columns(models, config.sets), index, config, path.suffix.lower(), stamps)

    @property
    def digest(self) -> str:
        """Of the models and the options."""
        identity = {
            "format": RECEIPT_FORMAT,
            "featpipe": version("featpipe"),
            "models": [_model_identity(model) for model in self.models],
            "columns": [asdict(columns) for columns in self.columns],
            "embeddings": [EXTRACTION_VERSION, self.config.embedding_dtype(self.models[0])],
            "kind": self.file_suffix,
            "top": self.config.top,
            "sets": self.config.sets,
        }
        return compute_fingerprint(identity)

    def make_receipt(self, image_digests: NDArray[np.uint8], status: Mapping[str, int]) -> PredictionReceipt:
        """The receipt, still without the digest of the file.

        Parameters
        ----------
        image_digests : ndarray of shape (n, 32), uint8
        status : mapping from str to int
        """
        return PredictionReceipt(self.digest, self.ids, _hash_image_digests(image_digests), self.stamps, dict(status))

    @property
    def ids(self) -> str:
        """Digest of the samples' ids."""
        ids = self.index.ids
        return digest_arrays([("data", ids.data), ("offsets", ids.offsets)])

    def find_current_receipt(self, path: Path, progress: ProgressCallback) -> PredictionReceipt | None:
        """The receipt of a file that is what would be written; None if it must be made.

        Images are read where their stamps differ, and the receipt is then updated.
        """
        recorded = read_receipt(path)
        if recorded is None or not recorded.is_deterministic:
            return None
        if (recorded.request, recorded.ids) != (self.digest, self.ids):  # before any image is read
            return None
        images = recorded.images
        if self.config.check_content or self.stamps is None or recorded.stamps != self.stamps:
            images = _hash_image_digests(_hash_images(self.index, progress))
        if not recorded.to_receipt().is_current(self.digest, _combine_inputs(self.ids, images)):
            return None
        updated = replace(recorded, stamps=self.stamps)
        if updated != recorded:
            with suppress(OSError):  # only speed depends on it
                _dump_receipt(path, updated)
        return updated


def read_receipt(path: Path) -> PredictionReceipt | None:
    """The receipt of a file, if the file has the bytes that were written; else None."""
    try:
        with open(receipt_path(path), "rb") as file:
            document = json.loads(file.read(MAX_RECEIPT_BYTES))
        receipt = PredictionReceipt(**{name: document[name] for name in PredictionReceipt.__dataclass_fields__})
        if document["format"] == RECEIPT_FORMAT and receipt.to_receipt().describes(path):
            return receipt
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass  # missing or damaged: the predictions are made again
    return None


def write_receipt(path: Path, receipt: PredictionReceipt) -> None:
    """Write the receipt of a finished file."""
    _dump_receipt(path, replace(receipt, bytes=path.stat().st_size, sha256=hash_file(path)))


def receipt_path(path: Path) -> Path:
    """Hidden, so that globs and readers of whole folders skip it."""
    return path.with_name(f".{path.name}.made.json")


def _dump_receipt(path: Path, receipt: PredictionReceipt) -> None:
    with atomic_write(receipt_path(path), text=True, folder=find_parts_directory(path)) as file:
        json.dump({"format": RECEIPT_FORMAT, **asdict(receipt)}, file, indent=1)


def _combine_inputs(ids: str, images: str) -> str:
    return compute_fingerprint([ids, images])


def _hash_image_digests(image_digests: NDArray[np.uint8]) -> str:
    return hashlib.sha256(np.ascontiguousarray(image_digests).data).hexdigest()


def _hash_images(index: Index, progress: ProgressCallback) -> NDArray[np.uint8]:
    """The digest of each image's bytes, shape (n, 32); zero where they cannot be read."""
    digests = np.zeros((len(index), 32), np.uint8)
    with index.open() as reader:
        for row in range(len(index)):
            with suppress(SampleError):
                digests[row] = np.frombuffer(digest(reader.read(row)), np.uint8)
            progress(Progress("comparing", row + 1, len(index)))
    return digests


def _model_identity(model: Model) -> dict[str, Any]:
    """Everything that decides a model's prediction for an embedding, and which embeddings it takes."""
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
