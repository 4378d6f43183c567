"""A trained model: inference on embeddings and images, loading and saving.

The file format is that of :class:`featpipe.storage.ModelBundle`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from numpy.typing import NDArray

from featpipe.backbones import BackboneIdentity
from featpipe.cache import FeatureCache, restrict_facts_to_output
from featpipe.config import TASKS, ExpandKeywords, FineTuneKeywords
from featpipe.data import DEFAULT_MODALITY, get_modality
from featpipe.errors import CacheMismatchError, ConfigError, ModelError, SampleError
from featpipe.metrics import Calibration, compute_logits
from featpipe.model import uncertainty
from featpipe.model.uncertainty import ConformalPredictor, Uncertainty
from featpipe.status import Status
from featpipe.storage import (
    HEAD_MEMBER,
    REPLAY_MEMORY_MEMBER,
    TRAINED_ON_MEMBER,
    UNCERTAINTY_MEMBER,
    WEIGHTS_MEMBER,
    ModelBundle,
    convert_bundle_errors,
    describe_differences,
)

if TYPE_CHECKING:
    from featpipe.inference import SampleList
    from featpipe.model.retained import ReplayMemory

STORED_DIGEST_BYTES = 16  # of each training sample's SHA-256: enough to recognize it, too little to reveal more


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
        The settings that determine the embeddings, as in the cache that the head was trained on.
    request : dict
        How to load the backbone again.
    trained_on : ndarray of shape (m, 16), uint8
        The first 16 bytes of the SHA-256 of each image that the head was trained on.
    scores : dict
        Measured scores, and how they were measured.
    history : dict
        Versions, time, head settings, origin of the training rows.
    calibration : Calibration or None
        Turns the head's scores into calibrated probabilities.
    kept : ReplayMemory or None
        Data retained from training, so that classes can be added.
    trust : Uncertainty
        The out-of-distribution score and the prediction sets, calibrated on held-out images.
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
    calibration: Calibration | None = None
    kept: ReplayMemory | None = field(default_factory=lambda: None)
    trust: Uncertainty = field(default_factory=Uncertainty)
    path: Path | None = None
    device: str = "auto"
    _carries_weights: bool = False
    _backbone: Any = None
    _engine: Any = None
    _unread: Mapping[str, bytes] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        """Load ``head`` and ``kept`` on first use: a prediction that is up to date does without scikit-learn."""
        if name not in ("head", "kept") or not self.__dict__.get("_unread"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self._load_head()
        return self.__dict__[name]

    def _load_head(self) -> None:
        from featpipe import heads
        from featpipe.model.retained import ReplayMemory

        members, self._unread = self._unread, {}
        with convert_bundle_errors(self.path or "model"):
            self.head, self.kept = heads.loads(members[HEAD_MEMBER]), None
            if REPLAY_MEMORY_MEMBER in members:
                self.kept = ReplayMemory.from_bytes(members[REPLAY_MEMORY_MEMBER], len(self.classes))
            if self.task == "classification" and not np.array_equal(self.head.classes_, np.arange(len(self.classes))):
                raise ModelError(f"its head was not trained on its {len(self.classes)} classes; train it again")
            if self.kept is not None:
                self.kept.check_compatible(self.head)

    @property
    def unread_head_digest(self) -> str | None:
        """SHA-256 of the head's bytes in the file; None once the head is loaded and may have been changed."""
        return hashlib.sha256(self._unread[HEAD_MEMBER]).hexdigest() if self._unread else None

    def __repr__(self) -> str:
        return f"Model({self.head_name} on {self.request['name']}, {self.task}, {len(self.classes)} classes)"

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
        if self.task == "regression":
            return np.asarray(self.head.predict(X))
        p = self.predict_proba_features(X)
        if self.task == "multilabel":
            return (p > 0.5).astype(np.int64)
        return np.array(self.classes, dtype=object)[p.argmax(axis=1)]

    def predict_proba_features(self, X: NDArray[np.floating]) -> NDArray[np.float64]:
        """Probabilities of shape (m, k) from embeddings, columns in the order of ``classes``."""
        if self.task == "regression":
            raise ConfigError("a regression model has no probabilities; use predict")
        if self.calibration is not None:
            return self.calibration.compute_probabilities(compute_logits(self.head, X), self.task == "multilabel")
        return np.asarray(self.head.predict_proba(X), np.float64)

    def novelty_features(self, X: NDArray[np.floating]) -> NDArray[np.float64]:
        """The out-of-distribution score of embeddings (m, d): percentile among held-out training images, shape (m,).

        Raises
        ------
        ConfigError
            If the model was saved by a version of featpipe without out-of-distribution scores.
        """
        if self.trust.novelty is None:
            raise ConfigError("this model has no out-of-distribution scores; train it again")
        if X.ndim != 2 or X.shape[1] != self.trust.novelty.references.shape[1]:
            raise ConfigError(f"embeddings of shape {X.shape}, expected (m, {self.trust.novelty.references.shape[1]})")
        return self.trust.novelty(X)

    def predict_sets_features(
        self, X: NDArray[np.floating], level: float = 0.9
    ) -> list[tuple[str, ...]] | NDArray[Any]:
        """Conformal prediction sets with a coverage of `level`, from embeddings.

        Parameters
        ----------
        X : ndarray of shape (m, d)
        level : float

        Returns
        -------
        list of m tuple of str
            Class names, the most probable first. For regression an ndarray of shape (m, t, 2): the ends of intervals.

        Raises
        ------
        ConfigError
            If the model was trained without cross-validation, with a ``prior``, or for several labels.
        """
        conformal = self.sets_known()
        if self.task == "regression":
            return conformal.predict_intervals(self.predict_features(X), level)
        p = self.predict_proba_features(X)
        order = np.argsort(-p, axis=1, kind="stable")
        is_included = np.take_along_axis(conformal.predict_sets(p, level), order, axis=1)
        return [tuple(self.classes[i] for i in row[included]) for row, included in zip(order, is_included, strict=True)]

    def sets_known(self) -> ConformalPredictor:
        """The calibrated conformal predictor; a ConfigError says why if there is none."""
        if self.trust.conformal is None:
            if self.task == "multilabel":
                raise ConfigError("a multi-label model has no prediction sets: its classes do not exclude each other")
            if self.history.get("expansions"):
                raise ConfigError(
                    "this model was expanded without held-out images of each class, which calibrate prediction sets; "
                    "expand the earlier model again with --calibration, or with --method joint if it had sets"
                )
            raise ConfigError(
                "this model has no held-out predictions, which calibrate prediction sets; train with --cv 2 or more "
                "and without --prior"
            )
        return self.trust.conformal

    def novelty(self, images: Sequence[object]) -> NDArray[np.float64]:
        """The out-of-distribution score of images, shape (m,): percentile among held-out training images."""
        return self.novelty_features(self.embed(images))

    def predict_sets(self, images: Sequence[object], level: float = 0.9) -> list[tuple[str, ...]] | NDArray[Any]:
        """Conformal prediction sets for images; see :meth:`predict_sets_features`."""
        self.sets_known()
        return self.predict_sets_features(self.embed(images), level)

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
            If an image cannot be read; the message names it.
        """
        return self.predict_features(self.embed(images))

    def predict_proba(self, images: Sequence[object]) -> NDArray[np.float64]:
        """Probabilities for images, shape (m, k), columns in the order of ``classes``."""
        return self.predict_proba_features(self.embed(images))

    @property
    def modality(self) -> str:
        """The kind of samples that the model takes, a key of `featpipe.data.MODALITIES`."""
        return str(self.facts["backbone"].get("modality", DEFAULT_MODALITY))

    def embed(self, images: Sequence[object]) -> NDArray[np.float32]:
        """The embeddings of images, shape (m, d), in the order given; parameters and errors as :meth:`predict`."""
        from featpipe.inference import SampleList

        samples = SampleList(get_modality(self.modality).to_list(images), self.modality)
        return embed_samples_or_raise(samples, self.engine(), self.output)

    @property
    def backbone(self) -> Any:
        """The frozen network, loaded on first access.

        Raises
        ------
        WeightsError
            If the weights are missing, or are not those that the head was trained on.
        ModelError
            If the network is custom code; pass it to :func:`load_model` if you trust it.
        """
        if self._backbone is None:
            self._raise_for_custom_code()
            self.attach(self.request["name"])
        return self._backbone

    def attach(self, backbone: Any) -> Model:
        """Use a backbone, given as a ``Backbone`` or by name; raise if its embeddings differ from those trained on."""
        from featpipe import backbones

        expected_facts = restrict_facts_to_output(self.facts, self.output)["backbone"]
        weights = self.path if self._carries_weights and isinstance(backbone, str) else None
        self._backbone = backbones.reload_backbone(
            backbone, self.request, expected_facts, context=str(self.path or "model"), weights=weights
        )
        self._engine = None
        return self

    @property
    def backbone_identity(self) -> BackboneIdentity | None:
        """The backbone that the model's embeddings need, without its network; None if it is the user's own code."""
        if ":" in self.request["name"]:
            return None
        facts = restrict_facts_to_output(self.facts, self.output)["backbone"]
        return BackboneIdentity(facts["name"], self.request, facts)

    def extraction(self, backbone: str | None = None) -> dict[str, Any]:
        """The settings of an extraction whose cache fits this model.

        Parameters
        ----------
        backbone : str, optional
            A name to use where the network itself is not needed; by default the model's backbone is loaded.
        """
        settings = {name: self.facts[name] for name in ("precision", "storage")}
        return {"backbone": backbone or self.backbone, "device": self.device, **settings}

    def engine(self, images: int = 0) -> Any:
        """The engine that embeds images for this model, optimized for their number, in the precision of training."""
        from featpipe.inference import Engine, resolve_device

        if self._engine is None or not self._engine.is_optimized_for(images):
            device = resolve_device(self.device)
            self._engine = Engine(self.backbone, device, self.facts["precision"], images=images)
        return self._engine

    def _raise_for_custom_code(self) -> None:
        name = self.request["name"]
        if ":" in name:
            raise ModelError(
                f"{self.path or 'model'}: its backbone {name!r} is a custom network, whose code is not run by default; "
                "if you trust it, pass --backbone (in Python backbone=..., or model.attach(...))"
            )

    def was_trained_on(self, digests: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Which images the head was trained on, by the SHA-256 of their bytes, shape (n, 32) → (n,)."""
        trained_digests = {row.tobytes() for row in self.trained_on}
        return np.array([row.tobytes() in trained_digests for row in digests[:, :STORED_DIGEST_BYTES]], bool)

    @property
    def identity(self) -> str:
        """A digest of the head's name, the classes, the training images and the time of training."""
        digest = hashlib.sha256(repr((self.classes, self.head_name)).encode())
        digest.update(self.trained_on.tobytes())
        digest.update(repr(self.history.get("created")).encode())
        return digest.hexdigest()

    def expand(self, data: Any, **options: Unpack[ExpandKeywords]) -> Model:
        """Make a model with more or fewer classes; see :func:`featpipe.expand`, which describes the keywords.

        Parameters
        ----------
        data : FeatureCache, path of one, archives, or several
        **options
            The keywords of :func:`featpipe.expand`.
        """
        from featpipe.incremental import expand

        return expand(self, data, **options).model

    def finetune(self, archives: Any, **options: Unpack[FineTuneKeywords]) -> Model:
        """Fine-tune the backbone; see :func:`featpipe.finetune`, which describes the keywords.

        Parameters
        ----------
        archives : path-like or sequence of path-like
        **options
            The keywords of :func:`featpipe.finetune`.
        """
        from featpipe.finetuning import finetune

        return finetune(self, archives, **options).model

    def check_cache(self, cache: FeatureCache) -> None:
        """Raise if the embeddings of a cache have other settings than those that the head was trained on."""
        if self.output not in cache.outputs:
            raise CacheMismatchError(
                f"{cache.path}: contains {', '.join(cache.outputs)}, the model was trained on {self.output!r}; "
                f"extract with --output {self.output}"
            )
        differing_facts = describe_differences(
            restrict_facts_to_output(cache.facts, self.output), restrict_facts_to_output(self.facts, self.output)
        )
        if differing_facts:
            raise CacheMismatchError(
                f"{cache.path}: its embeddings are not those that the model was trained on "
                f"({'; '.join(differing_facts[:4])}); extract again with the model's backbone"
            )

    @staticmethod
    def check_target(path: str | os.PathLike[str]) -> None:
        """Raise a ModelError for a path that `save` cannot write to; called before training starts."""
        ModelBundle.check_target(path)

    def save(self, path: str | os.PathLike[str], *, portable: bool | None = None) -> Path:
        """Write the model to one file; an existing file is replaced atomically.

        Parameters
        ----------
        path : path-like
        portable : bool, optional
            Store the backbone's weights in the file, instead of referring to them by digest. By default as in the file
            that the model was loaded from; a new model refers to them.

        Raises
        ------
        ModelError
            If the head cannot be saved without pickling, or the file cannot be written.
        """
        from featpipe import heads

        target = Path(path)
        portable = self._carries_weights if portable is None else portable
        members = {HEAD_MEMBER: heads.dumps(self.head), TRAINED_ON_MEMBER: self.trained_on.tobytes()}
        if self.kept is not None:
            members[REPLAY_MEMORY_MEMBER] = self.kept.to_bytes()
        if self.trust.novelty is not None or self.trust.conformal is not None:
            members[UNCERTAINTY_MEMBER] = uncertainty.dumps(self.trust)
        if portable:
            members[WEIGHTS_MEMBER] = self._serialize_weights()
        ModelBundle(self._to_document(portable), members).write(target)
        return target

    @classmethod
    def _from_bundle(cls, bundle: ModelBundle, path: Path, device: str) -> Model:
        document, members = bundle.document, bundle.members
        k = len(document["classes"])
        calibration = document.get("calibration")
        model = cls(
            head=None,
            head_name=document["head"],
            task=document["task"],
            classes=tuple(document["classes"]),
            output=document["output"],
            facts=document["facts"],
            request=document["backbone"],
            trained_on=np.frombuffer(members[TRAINED_ON_MEMBER], np.uint8).reshape(-1, STORED_DIGEST_BYTES),
            scores=document["scores"],
            history=document["history"],
            calibration=None if calibration is None else Calibration.from_dict(calibration, k),
            trust=uncertainty.loads(members[UNCERTAINTY_MEMBER]) if UNCERTAINTY_MEMBER in members else Uncertainty(),
            path=path,
            device=device,
            _carries_weights=bundle.has_weights,
            _unread={name: members[name] for name in (HEAD_MEMBER, REPLAY_MEMORY_MEMBER) if name in members},
        )
        del model.head, model.kept  # `__getattr__` loads them on first use
        return model

    def _to_document(self, portable: bool) -> dict[str, Any]:
        return {
            "head": self.head_name,
            "task": self.task,
            "classes": list(self.classes),
            "output": self.output,
            "facts": self.facts,
            "backbone": self.request,
            "scores": self.scores,
            "history": {**self.history, "portable": portable},
            "calibration": None if self.calibration is None else self.calibration.to_dict(),
            "kept": None if self.kept is None else self.kept.to_summary(),
        }

    def _serialize_weights(self) -> bytes:
        import safetensors.torch

        state = self.backbone.network.state_dict()
        # copies, because safetensors refuses tensors that share memory, such as tied weights
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
        return safetensors.torch.save(tensors)


def load_model(path: str | os.PathLike[str], *, backbone: Any = None, device: str = "auto") -> Model:
    """Load a model from a file; nothing in the file can run code.

    Parameters
    ----------
    path : path-like
    backbone : str or Backbone, optional
        Required if the model was trained on a custom network.
    device : str
        The device that its backbone runs on.

    Raises
    ------
    ModelError
        If the file is missing or damaged, or contains types that are not trusted.

    Examples
    --------
    >>> model = load_model("photos.model")                                   # doctest: +SKIP
    >>> model.predict(["a.jpg", "b.jpg"])                                    # doctest: +SKIP
    """
    model = open_model(path, device=device)
    model._load_head()
    return model if backbone is None else model.attach(backbone)


def open_model(path: str | os.PathLike[str], *, device: str = "auto") -> Model:
    """Load a model whose head is read from the bytes of the file on first use; errors as :func:`load_model`."""
    bundle = _read_bundle(path, HEAD_MEMBER, TRAINED_ON_MEMBER, REPLAY_MEMORY_MEMBER, UNCERTAINTY_MEMBER)
    with convert_bundle_errors(path):
        return Model._from_bundle(bundle, Path(path), device)


def read_document(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the document of a model file without loading its head."""
    return _read_bundle(path).document


def _read_bundle(path: str | os.PathLike[str], *members: str) -> ModelBundle:
    bundle = ModelBundle.read(path, members)
    if bundle.document["task"] not in TASKS:
        raise ModelError(f"{path}: model.json names no task of {', '.join(TASKS)}; train the model again")
    return bundle


def embed_samples_or_raise(samples: SampleList, engine: Any, output: str) -> NDArray[np.float32]:
    """The embeddings of samples in memory, shape (m, …), in the order given.

    Raises
    ------
    SampleError
        If one has no embedding.
    """
    from featpipe.inference import embed_sample_list

    features, status_codes = embed_sample_list(samples, engine, output)
    raise_for_failures(samples.items, status_codes)
    return features


def raise_for_failures(images: Sequence[object], status_codes: NDArray[np.integer]) -> None:
    """Raise for the first image without an embedding: a list of predictions has no place for the reason.

    Parameters
    ----------
    images : sequence of length m
    status_codes : ndarray of shape (m,)
        Codes of :class:`featpipe.status.Status`.
    """
    for row in np.flatnonzero(status_codes)[:1].tolist():
        image, status = images[row], Status(int(status_codes[row]))
        name = str(image) if isinstance(image, (str, os.PathLike)) else type(image).__name__
        raise SampleError(
            f"image {row} ({name}): {status.word}; remove or repair it", status=status, sample_id=str(row)
        )
