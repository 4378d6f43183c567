"""Backbone + head + classes, as one safe file on disk; predicts on images.

The file is a zip archive, uncompressed, of ``model.json``, ``head.skops``, ``trained_on.bin`` and, if it carries its
weights, ``backbone.safetensors``. ``model.json`` names the SHA-256 of the others. Nothing in it is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe import heads
from featpipe.cache import FeatureCache, fsync_directory, narrowed
from featpipe.errors import CacheMismatchError, ConfigError, ModelError, SampleError, WeightsError
from featpipe.fingerprint import canonical, differences
from featpipe.status import Status

__all__ = ["FORMAT", "FORMAT_VERSION", "KEPT_DIGEST_BYTES", "Model", "load_model"]

FORMAT = "featpipe-model"
FORMAT_VERSION = "1.0"
KEPT_DIGEST_BYTES = 16  # of each training image's SHA-256: enough to know it again, too little to say more
MEMBER_BYTES_MAX = {"model.json": 64 * 2**20, "head.skops": 8 * 2**30, "trained_on.bin": 8 * 2**30}
WEIGHTS_MEMBER = "backbone.safetensors"
WEIGHTS_BYTES_MAX = 64 * 2**30


@dataclass(eq=False)
class Model:
    """A trained model.

    Attributes
    ----------
    head : estimator
        A fitted scikit-learn estimator on the features of ``output``.
    head_name : str
    task : {"classification", "regression", "multilabel"}
    classes : tuple of str
        Class names in the order of the probabilities' columns; target names for regression.
    output : str
        The backbone's output that the head was trained on.
    facts : dict
        The facts that decide the embeddings, as in the cache that the head was trained on.
    request : dict
        How to load the backbone again.
    trained_on : ndarray of shape (m, 16), uint8
        The beginning of the SHA-256 of each image that the head was trained on.
    scores : dict
        What is known of its quality, and how that was measured.
    history : dict
        Versions, time, head settings, origin of the training rows.
    """

    head: Any
    head_name: str
    task: str
    classes: tuple[str, ...]
    output: str
    facts: dict[str, Any]
    request: dict[str, Any]
    trained_on: NDArray[np.uint8]
    scores: dict[str, Any] = field(default_factory=dict)
    history: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    device: str = "auto"
    _backbone: Any = None
    _engine: Any = None

    def __repr__(self) -> str:
        return f"Model({self.head_name} on {self.request['name']}, {self.task}, {len(self.classes)} classes)"

    # -- on features ---------------------------------------------------------------------------------------------

    def predict_features(self, X: NDArray[np.floating]) -> NDArray[Any]:
        """Predictions from embeddings.

        Parameters
        ----------
        X : ndarray of shape (m, d)

        Returns
        -------
        ndarray
            Class names of shape (m,); targets of shape (m,) or (m, t); or a 0/1 matrix of shape (m, k).
        """
        if self.task == "classification":
            return np.array(self.classes, dtype=object)[self.head.predict(X)]
        return np.asarray(self.head.predict(X))

    def predict_proba_features(self, X: NDArray[np.floating]) -> NDArray[np.float64]:
        """Probabilities of shape (m, k) from embeddings, columns in the order of ``classes``."""
        if self.task == "regression":
            raise ConfigError("this model predicts numbers, not classes; it has no probabilities: use predict")
        return np.asarray(self.head.predict_proba(X), np.float64)

    # -- on images -----------------------------------------------------------------------------------------------

    def predict(self, images: Sequence[object]) -> NDArray[Any]:
        """Predictions for images, in the order given.

        Parameters
        ----------
        images : sequence
            Paths, encoded bytes, Pillow images, or uint8 arrays of shape (h, w), (h, w, 3) or (h, w, 4).

        Returns
        -------
        ndarray
            As :meth:`predict_features`.

        Raises
        ------
        SampleError
            If one of the images cannot be read; it says which.
        """
        return self.predict_features(self.embed(images))

    def predict_proba(self, images: Sequence[object]) -> NDArray[np.float64]:
        """Probabilities for images, shape (m, k), columns in the order of ``classes``."""
        return self.predict_proba_features(self.embed(images))

    def embed(self, images: Sequence[object]) -> NDArray[np.float32]:
        """The embeddings of images, shape (m, d), in the order given; parameters and errors as :meth:`predict`."""
        from featpipe.loader import Pictures, embed_pictures

        if isinstance(images, (str, bytes, os.PathLike)) or not hasattr(images, "__len__"):
            raise ConfigError("images must be a list, for one image [image]; for a whole archive: featpipe predict")
        if not len(images):
            raise ConfigError("images is an empty list; there is nothing to predict")
        pictures = Pictures(list(images))
        features, codes = embed_pictures(pictures, self.backbone.transform, self.engine(), self.output)
        for row in np.flatnonzero(codes)[:1]:
            status = Status(int(codes[row]))
            name = f"image {row} ({_named(images[row])})"
            raise SampleError(f"{name}: {status.word}; leave it out or repair it", status=status, sample_id=str(row))
        return features

    # -- the backbone --------------------------------------------------------------------------------------------

    @property
    def backbone(self) -> Any:
        """The frozen network, loaded when it is first asked for.

        Raises
        ------
        WeightsError
            If the weights are not there, or not the ones that the head was trained on.
        ModelError
            If the network is code of somebody's own; pass it to :func:`load_model` if you trust it.
        """
        if self._backbone is None:
            self.attach(self._load_backbone())
        return self._backbone

    def attach(self, backbone: Any) -> Model:
        """Use this backbone, a ``Backbone`` or a name; refused if its embeddings are not the ones trained on."""
        from featpipe import backbone as backbones

        if not isinstance(backbone, backbones.Backbone):
            request = {**self.request, "name": backbone}
            backbone = _load(request)
        wanted = narrowed(self.facts, self.output)["backbone"]
        found = narrowed({"backbone": backbone.facts()}, self.output)["backbone"]
        if found != wanted:
            raise WeightsError(
                f"{self.path or 'model'}: was trained on another backbone ({'; '.join(differences(found, wanted)[:4])}); "
                "bring the weights it was trained with"
            )
        self._backbone, self._engine = backbone, None
        return self

    def engine(self) -> Any:
        """The engine that embeds for this model, in the precision it was trained with."""
        from featpipe.engine import Engine, resolve_device

        if self._engine is None:
            self._engine = Engine(self.backbone, resolve_device(self.device), self.facts["precision"])
        return self._engine

    def _load_backbone(self) -> Any:
        if self.path is not None and self.history.get("portable"):
            return self._load_carried()
        if ":" in self.request["name"] or self.request.get("own"):
            raise ModelError(
                f"{self.path or 'model'}: its backbone {self.request['name']!r} is code of its author's own, which is "
                "not run unasked; pass --backbone (in Python backbone=...) if you trust it"
            )
        return _load({**self.request, "outputs": [self.output]})

    def _load_carried(self) -> Any:
        import tempfile

        assert self.path is not None
        with zipfile.ZipFile(self.path) as file, tempfile.TemporaryDirectory() as folder:
            weights = Path(folder) / WEIGHTS_MEMBER
            with file.open(WEIGHTS_MEMBER) as source, open(weights, "wb") as target:
                while block := source.read(1 << 24):
                    target.write(block)
            return _load({**self.request, "outputs": [self.output], "weights": str(weights)})

    # -- training rows -------------------------------------------------------------------------------------------

    def was_trained_on(self, digests: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Which images the head was trained on, by the SHA-256 of their bytes, shape (n, 32) → (n,)."""
        known = {row.tobytes() for row in self.trained_on}
        return np.array([row.tobytes() in known for row in digests[:, :KEPT_DIGEST_BYTES]], bool)

    def check_cache(self, cache: FeatureCache) -> None:
        """Refuse a cache whose embeddings are not of the kind that the head was trained on."""
        if self.output not in cache.outputs:
            raise CacheMismatchError(
                f"{cache.path}: holds {', '.join(cache.outputs)}, the model was trained on {self.output!r}; "
                f"extract with --output {self.output}"
            )
        differ = differences(narrowed(cache.facts, self.output), narrowed(self.facts, self.output))
        if differ:
            raise CacheMismatchError(
                f"{cache.path}: holds other embeddings than the model was trained on ({'; '.join(differ[:4])}); "
                "extract again with the model's backbone"
            )

    # -- on disk -------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], *, portable: bool = False) -> Path:
        """Write the model to one file, replacing what was there in one step.

        Parameters
        ----------
        path : path-like
        portable : bool
            Carry the backbone's weights in the file, instead of referring to them by digest.

        Raises
        ------
        ModelError
            If the head cannot be saved without pickling, or the disk is full.
        """
        target = Path(path)
        members = {"head.skops": heads.dumps(self.head), "trained_on.bin": self.trained_on.tobytes()}
        if portable:
            members[WEIGHTS_MEMBER] = self._weights()
        document = self._document(portable, {name: hashlib.sha256(data).hexdigest() for name, data in members.items()})
        temporary = target.with_name(f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "xb") as handle:
                with zipfile.ZipFile(handle, "w", zipfile.ZIP_STORED) as file:
                    file.writestr(zipfile.ZipInfo("model.json"), canonical(document))
                    for name, data in members.items():
                        file.writestr(zipfile.ZipInfo(name), data)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, target)
            fsync_directory(target.parent)
        except OSError as error:
            raise ModelError(f"{target}: cannot be written ({error.strerror or error}); choose another --out") from None
        finally:
            temporary.unlink(missing_ok=True)
        return target

    def _document(self, portable: bool, files: dict[str, str]) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "head": self.head_name,
            "task": self.task,
            "classes": list(self.classes),
            "output": self.output,
            "facts": self.facts,
            "backbone": self.request,
            "scores": self.scores,
            "history": {**self.history, "portable": portable},
            "files": files,
        }

    def _weights(self) -> bytes:
        import safetensors.torch

        state = {name: value.detach().cpu().contiguous() for name, value in self.backbone.network.state_dict().items()}
        return safetensors.torch.save(state)


def load_model(path: str | os.PathLike[str], *, backbone: Any = None, device: str = "auto") -> Model:
    """Read a model; nothing in the file can run code.

    Parameters
    ----------
    path : path-like
    backbone : str or Backbone, optional
        Needed if the model was trained on code of somebody's own.
    device : str
        Where its backbone will run.

    Raises
    ------
    ModelError
        If there is no such file, it is damaged, or holds what may not be loaded.

    Examples
    --------
    >>> model = load_model("photos.model")                                   # doctest: +SKIP
    >>> model.predict(["a.jpg", "b.jpg"])                                    # doctest: +SKIP
    """
    source = Path(path)
    if not source.is_file():
        raise ModelError(f"{source}: there is no such model file; `featpipe train` makes one and prints its path")
    try:
        document, members = _read(source)
        digests = np.frombuffer(members["trained_on.bin"], np.uint8).reshape(-1, KEPT_DIGEST_BYTES)
        model = Model(
            head=heads.loads(members["head.skops"]),
            head_name=document["head"],
            task=document["task"],
            classes=tuple(document["classes"]),
            output=document["output"],
            facts=document["facts"],
            request=document["backbone"],
            trained_on=digests,
            scores=document["scores"],
            history=document["history"],
            path=source,
            device=device,
        )
        _ = model.request["name"], model.facts["backbone"]["outputs"], model.facts["precision"]
    except ModelError as error:
        text = str(error)
        raise ModelError(text if text.startswith(str(source)) else f"{source}: {text}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, NotImplementedError) as error:
        raise ModelError(f"{source}: is damaged or not a featpipe model ({type(error).__name__}: {error})") from None
    return model if backbone is None else model.attach(backbone)


def read_document(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a model says of itself, without loading its head: for ``featpipe info``."""
    try:
        return _read(Path(path))[0]
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ModelError(f"{path}: is damaged or not a featpipe model ({type(error).__name__}: {error})") from None


def _read(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    with zipfile.ZipFile(path) as file:
        infos = {info.filename: info for info in file.infolist()}
        unknown = infos.keys() - MEMBER_BYTES_MAX.keys() - {WEIGHTS_MEMBER}
        if unknown or len(infos) != len(file.infolist()):
            raise ModelError(f"holds {sorted(unknown) or 'a member twice'}, which no model does")
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos.values()):
            raise ModelError("holds compressed members, which no model does")
        for name, most in MEMBER_BYTES_MAX.items():
            if name not in infos:
                raise ModelError(f"has no {name}; it is not a featpipe model")
            if infos[name].file_size > min(most, path.stat().st_size):
                raise ModelError(f"{name} declares {infos[name].file_size} bytes, more than a model may hold")
        document = json.loads(file.read("model.json"))
        if document.get("format") != FORMAT or str(document.get("format_version")).split(".")[0] != "1":
            raise ModelError(f"is of format {document.get('format')} {document.get('format_version')}, not {FORMAT} 1")
        members = {name: file.read(name) for name in ("head.skops", "trained_on.bin")}
        for name, data in members.items():
            if hashlib.sha256(data).hexdigest() != document["files"][name]:
                raise ModelError(f"{name} is damaged: its digest is not the one in model.json")
    return document, members


def _load(request: Mapping[str, Any]) -> Any:
    from featpipe import backbone as backbones

    return backbones.load(
        request["name"],
        weights=request.get("weights"),
        outputs=tuple(request["outputs"]),
        seed=int(request.get("seed", 0)),
    )


def _named(item: object) -> str:
    return str(item) if isinstance(item, (str, os.PathLike)) else type(item).__name__
