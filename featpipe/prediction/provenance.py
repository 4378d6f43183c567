"""The receipt of a finished prediction file: a small hidden file beside it, which allows reusing the predictions.

Names and paths do not matter. A prediction file is current if the models, the options, the ids and the bytes of every
image are the same, and the file has the bytes that were written. Unchanged images are recognised by size and
modification time; if these differ, the bytes are read. Without a receipt, images are predicted again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from time import time_ns
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featpipe.cache import restrict_facts_to_output
from featpipe.data import Index
from featpipe.errors import SampleError
from featpipe.extraction import EXTRACTION_VERSION
from featpipe.model import dumps
from featpipe.prediction.config import PredictConfig
from featpipe.prediction.writers import find_parts_directory, make_columns
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
    make_receipt_path,
)

if TYPE_CHECKING:
    from featpipe.model import Model

PREDICTION_RECEIPT_FORMAT = "featpipe-predictions/1"
MAX_PREDICTION_RECEIPT_BYTES = 2**20


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
    unread : str or None
        Digest of the models and the options, with the heads as bytes of the model files; None for models in memory.
    mtime_ns : int or None
        Modification time of the file.
    command : str or None
        Digest of the command that wrote the file; None for a call in Python.
    """

    request: str
    ids: str
    images: str
    stamps: str | None
    status: Mapping[str, int]
    bytes: int = 0
    sha256: str = ""
    unread: str | None = None
    mtime_ns: int | None = None
    command: str | None = None

    @property
    def is_deterministic(self) -> bool:
        """Whether another run would give the same file; an image with a transient status may be readable now."""
        return not any(status.word in self.status for status in Status if status.transient)


class PredictionRequest:
    """A request for predictions, and the digests that identify it.

    Create it right after the images are listed, because it compares their times with the clock, and before a head is
    loaded: if a receipt has the digests of the head files, it can be checked without importing scikit-learn.

    Parameters
    ----------
    models : sequence of Model
    index : Index
    config : PredictConfig
    path : Path
        Its suffix determines the file format.
    """

    def __init__(self, models: Sequence[Model], index: Index, config: PredictConfig, path: Path) -> None:
        self._models, self._index, self._config, self._file_suffix = models, index, config, path.suffix.lower()
        has_racy_mtime = np.any(index.mtime_ns > time_ns() - RACY_NANOSECONDS)
        self._stamps = (
            None if has_racy_mtime else digest_arrays([("stamps", index.compute_stamps()), ("fault", index.fault)])
        )
        self._ids = digest_arrays([("data", index.ids.data), ("offsets", index.ids.offsets)])
        head_digests = [model.unread_head_digest for model in models]
        self._unread_digest = None if None in head_digests else self._compute_digest(head_digests)

    @cached_property
    def _digest(self) -> str:
        import joblib

        return self._compute_digest([joblib.hash(model.head) for model in self._models])

    def _compute_digest(self, head_digests: Sequence[str | None]) -> str:
        """Compute the digest of the models and the options."""
        identity = {
            "format": PREDICTION_RECEIPT_FORMAT,
            "featpipe": version("featpipe"),
            "models": [
                {"head": head_digest, **_make_model_identity(model)}
                for model, head_digest in zip(self._models, head_digests, strict=True)
            ],
            "columns": [asdict(columns) for columns in make_columns(self._models, self._config.sets)],
            "embeddings": [EXTRACTION_VERSION, self._config.embedding_dtype(self._models[0])],
            "kind": self._file_suffix,
            "top": self._config.top,
            "sets": self._config.sets,
        }
        return compute_fingerprint(identity)

    def write_receipt(self, path: Path, image_digests: NDArray[np.uint8], status: Mapping[str, int]) -> None:
        """Write the receipt of a finished file.

        Parameters
        ----------
        path : Path
        image_digests : ndarray of shape (n, 32), uint8
        status : mapping from str to int
        """
        stat = path.stat()
        receipt = PredictionReceipt(
            self._digest,
            self._ids,
            _hash_image_digests(image_digests),
            self._stamps,
            dict(status),
            stat.st_size,
            hash_file(path),
            self._unread_digest,
            stat.st_mtime_ns,
        )
        _dump_receipt(path, receipt)

    def find_current_receipt(self, path: Path, progress: ProgressCallback) -> PredictionReceipt | None:
        """Find the receipt of a file that is up to date; None if the file must be written.

        Images whose stamps differ are read, and the receipt is then updated.
        """
        recorded = read_receipt(path)
        if recorded is None or not recorded.is_deterministic or recorded.ids != self._ids:
            return None
        has_same_files = self._unread_digest is not None and recorded.unread == self._unread_digest
        if not has_same_files and recorded.request != self._digest:  # before any image is read
            return None
        has_same_stamps = self._stamps is not None and recorded.stamps == self._stamps
        must_read = self._config.check_content or not has_same_stamps
        if must_read and recorded.images != _hash_image_digests(_hash_images(self._index, progress)):
            return None
        updated = replace(recorded, stamps=self._stamps, unread=self._unread_digest or recorded.unread)
        if updated != recorded:
            with suppress(OSError):  # the update only saves time
                _dump_receipt(path, updated)
        return updated


def read_receipt(path: Path) -> PredictionReceipt | None:
    """Read the receipt of a file; None unless the file has the bytes that were written."""
    try:
        with open(make_receipt_path(path), "rb") as file:
            document = json.loads(file.read(MAX_PREDICTION_RECEIPT_BYTES))
        fields = PredictionReceipt.__dataclass_fields__.keys()
        receipt = PredictionReceipt(**{name: document[name] for name in fields if name in document})
        output = Receipt(receipt.request, output_sha256=receipt.sha256, output_bytes=receipt.bytes)
        if document["format"] == PREDICTION_RECEIPT_FORMAT and output.describes(path):
            return receipt
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass  # missing or damaged: predict again
    return None


def _dump_receipt(path: Path, receipt: PredictionReceipt) -> None:
    with atomic_write(make_receipt_path(path), text=True, folder=find_parts_directory(path)) as file:
        json.dump({"format": PREDICTION_RECEIPT_FORMAT, **asdict(receipt)}, file, indent=1)


def _hash_image_digests(image_digests: NDArray[np.uint8]) -> str:
    return hashlib.sha256(np.ascontiguousarray(image_digests).data).hexdigest()


def _hash_images(index: Index, progress: ProgressCallback) -> NDArray[np.uint8]:
    """Compute the digest of each image's bytes, shape (n, 32); zero if they cannot be read."""
    digests = np.zeros((len(index), 32), np.uint8)
    with index.open() as reader:
        for row in range(len(index)):
            with suppress(SampleError):
                digests[row] = np.frombuffer(digest(reader.read(row)), np.uint8)
            progress(Progress("comparing", row + 1, len(index)))
    return digests


def _make_model_identity(model: Model) -> dict[str, Any]:
    """Collect everything but the head that determines a model's predictions and its embeddings."""
    calibration = model.calibration
    return {
        "task": model.task,
        "classes": list(model.classes),
        "output": model.output,
        "backbone": restrict_facts_to_output(model.facts, model.output)["backbone"],
        "precision": model.facts["precision"],
        "calibration": None if calibration is None else calibration.to_dict(),
        "trust": hashlib.sha256(dumps(model.trust)).hexdigest(),
    }
