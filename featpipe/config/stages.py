"""The settings of each stage: the one home of the defaults that commands, recipes and Python share."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from featpipe.config.validation import check_names, unknown_name_error
from featpipe.errors import ConfigError
from featpipe.runtime import parse_duration

__all__ = ["AUTO", "ENGINES", "PRECISIONS", "STORAGES", "TASKS", "ExtractionConfig", "FineTuneConfig", "Task"]

Task = Literal["classification", "regression", "multilabel"]
TASKS: tuple[Task, ...] = ("classification", "regression", "multilabel")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
STORAGES = ("float32", "float16")
ENGINES = ("auto", "torch", "openvino")
AUTO = "auto"
OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "one-cycle", "constant")


@dataclass(frozen=True)
class ExtractionConfig:
    """How to extract: the one home of the defaults.

    Parameters
    ----------
    backbone : str or torch.nn.Module or Backbone
        A name that ``featpipe backbones`` lists, ``package.module:factory``, or a network.
    weights : str or path-like, optional
        A published name, a file, or ``"none"`` for the untrained architecture; the published default if not given.
    outputs : sequence of str
        What to cache of the network: ``pooled``, or ``NODE[:POOL]``.
    transform : callable, optional
        For a network of your own: uint8 (3, H, W) → float32 (3, h, w).
    seed : int
        For untrained weights.
    labels : path-like or Table, optional
        A CSV or Parquet table of paths and labels.
    device : str
        ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``, or several joined by commas: then a process for each.
        ``cuda`` is all GPUs of the machine.
    precision : {"fp32", "tf32", "bf16", "fp16", "auto"}
        ``auto``: the fastest whose embeddings of the first images are within ``min_cosine`` of those in fp32.
    min_cosine : float
        The smallest cosine to fp32 that ``precision="auto"`` accepts.
    engine : {"auto", "torch", "openvino"}
        What computes on a CPU; not part of a cache's identity, as the device is not.
    storage : {"float32", "float16"}
        How the features are stored.
    cache : path-like
        The folder where caches are kept and looked for.
    out : path-like, optional
        The cache's file; a name made from archive, backbone and fingerprint in ``cache`` if not given.
    overwrite : bool
        Replace a cache at ``out`` that was made from something else.
    shard_bytes : int
        Features larger than this are spread over several files of about this size.
    workers, batch : int, optional
        Threads, and images in one forward pass; chosen for the machine if not given.
    max_bad : int, float or str, optional
        How many images may have no features before the extraction stops: a number, or a share such as ``"5%"`` or
        ``0.05``. No limit if not given.
    time_limit : float or str, optional
        Seconds, or a time such as ``"3h"``, after which the extraction stops so that it can be gone on with.
    check_content : bool
        Read every image's bytes even where size and modification time say that it is unchanged.
    """

    backbone: Any = "efficientnet_lite0"
    weights: str | os.PathLike[str] | None = None
    outputs: Sequence[str] = ("pooled",)
    transform: Any = None
    seed: int = 0
    labels: Any = None
    device: str = "auto"
    precision: str = "fp32"
    min_cosine: float = 0.999
    engine: str = "auto"
    storage: str = "float32"
    cache: str | os.PathLike[str] = "cache"
    out: str | os.PathLike[str] | None = None
    overwrite: bool = False
    shard_bytes: int = 4 * 2**30
    workers: int | None = None
    batch: int | None = None
    max_bad: int | float | str | None = None
    time_limit: float | str | None = None
    check_content: bool = False

    def __post_init__(self) -> None:
        if self.precision not in (*PRECISIONS, AUTO):
            raise unknown_name_error("precision", self.precision, (*PRECISIONS, AUTO))
        if self.engine not in ENGINES:
            raise unknown_name_error("engine", self.engine, ENGINES)
        if not 0 <= self.min_cosine <= 1:
            raise ConfigError(f"min_cosine is {self.min_cosine}; it must be from 0 to 1")
        if self.storage not in STORAGES:
            raise unknown_name_error("storage", self.storage, STORAGES)
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"workers is {self.workers}; it must be at least 1")
        if self.shard_bytes < 1:
            raise ConfigError(f"shard_bytes is {self.shard_bytes}; it must be at least 1")
        if isinstance(self.outputs, str):
            object.__setattr__(self, "outputs", (self.outputs,))
        self.get_max_bad_count(0)
        if self.time_limit is not None:
            parse_duration(self.time_limit)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> ExtractionConfig:
        """From keyword arguments; an unknown one is answered with the nearest."""
        check_names("setting", settings, [f.name for f in fields(cls)])
        return cls(**settings)

    def get_max_bad_count(self, n: int) -> int | None:
        """How many of n images may be bad."""
        value = self.max_bad
        if value is None:
            return None
        try:
            if isinstance(value, str) and value.endswith("%"):
                value = float(value[:-1]) / 100
            number = float(value)
        except ValueError:
            raise ConfigError(f"max-bad is {self.max_bad!r}; give a number or a share such as 5%") from None
        is_share = isinstance(value, float) or (isinstance(value, str) and "." in value)
        if number < 0 or (is_share and number > 1):
            raise ConfigError(f"max-bad is {self.max_bad!r}; a number is at least 0, a share at most 100%")
        return int(number * n) if is_share else int(number)


@dataclass(frozen=True)
class FineTuneConfig:
    """How to fine-tune: the one home of the defaults.

    Parameters
    ----------
    unfreeze : str, int or float
        What is trained below the new layer: ``head`` (nothing), ``last``, ``3`` or ``3 stages``, ``0.3`` (that share of
        the stages), ``all``, ``layers[15:]`` (a slice of the layers with weights, the input's first), or a glob of
        module names such as ``blocks.6*``; several joined by commas.
    weights : str, optional
        ``none`` starts from the untrained architecture and a new layer, and trains all of it.
    gradual : int
        Train the new layer alone for so many epochs, then one more stage every so many; 0 trains all from the start.
    batch_norm : {"frozen", "trained"}
        Whether batch norms keep the statistics they came with, also in the part that is trained, or follow the batches
        there.
    epochs, batch : int
        Batch: images in one step of the optimizer.
    accumulate : int
        Into how many pieces a batch is divided, for its gradients to be summed; more where memory runs out.
    optimizer : {"adamw", "sgd"}
        SGD has a Nesterov momentum of ``momentum``.
    learning_rate : float or "find"
        The highest rate of the new layer; ``find`` looks for one on the first batches.
    layer_decay : float
        What the rate is multiplied by from the new layer to the last stage, and from each stage to the one before.
    momentum : float
    weight_decay : float
        Of weights, and not of norms and biases.
    warmup : float
        Share of the steps in which the rate rises.
    schedule : {"cosine", "one-cycle", "constant"}
    clip : float
        The longest that the gradient may be; 0 for any.
    precision : {"fp32", "bf16", "fp16"}
        Of the forward and backward passes; weights and their updates are float32.
    label_smoothing, mixup, cutmix : float
        Alpha of Beta(alpha, alpha) of the latter two (Zhang et al. 2018, Yun et al. 2019); 0 is without.
    augmentation : mapping
        How pictures are changed in training, by the names of :class:`featpipe.finetuning.Augmentation`.
    class_weight, sampling : "balanced", optional
        Rare classes count more in the loss; are drawn more often.
    ema : float
        Decay of a moving average of the weights, which is then what is judged and kept; 0 is without.
    patience : int
        Stop after so many epochs without a better one. 0 never does: the first epochs, at the highest rates, are often
        worse than the start, and the last ones better. The best epoch is kept in any case.
    monitor : {"score", "loss"}
        What an epoch is judged by, on validation images: the share of right answers (R² of numbers), which is what the
        final table decides by, and the loss where that is equal; or the loss alone, which rises with a network's
        confidence while its answers still get better.
    test, validation : float
        Shares of the images that are held out for the final table, and of the rest that decide when to stop, where the
        labels come without a split.
    cache_activations : {"auto", "yes", "no"}
        Compute the frozen part once and train on its feature maps; ``auto`` where that is faster.
    views : int
        Augmented views of each image that are then cached; epochs take turns.
    seed : int
    device : str
        ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
    workers : int, optional
        Threads that decode; as many as there are cores if not given.
    keep_worse : bool
        Save the fine-tuned model even if it is worse than the probe on held-out images.
    """

    unfreeze: str | int | float = "last"
    weights: str | None = None
    gradual: int = 0
    batch_norm: str = "frozen"
    epochs: int = 10
    batch: int = 32
    accumulate: int = 1
    optimizer: str = "adamw"
    learning_rate: float | str = 3e-4
    layer_decay: float = 0.8
    momentum: float = 0.9
    weight_decay: float = 0.01
    warmup: float = 0.1
    schedule: str = "cosine"
    clip: float = 1.0
    precision: str = "fp32"
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    augmentation: Mapping[str, Any] = field(default_factory=dict)
    class_weight: str | None = None
    sampling: str | None = None
    ema: float = 0.0
    patience: int = 0
    monitor: str = "score"
    test: float = 0.2
    validation: float = 0.2
    cache_activations: str = AUTO
    views: int = 4
    seed: int = 0
    device: str = AUTO
    workers: int | None = None
    keep_worse: bool = False

    def __post_init__(self) -> None:
        choices = {
            "batch_norm": ("frozen", "trained"),
            "optimizer": OPTIMIZERS,
            "schedule": SCHEDULES,
            "precision": ("fp32", "bf16", "fp16"),
            "monitor": ("score", "loss"),
            "cache_activations": (AUTO, "yes", "no"),
            "class_weight": (None, "balanced"),
            "sampling": (None, "balanced"),
            "weights": (None, "none"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise unknown_name_error(
                    name, str(getattr(self, name)), [choice for choice in allowed if choice is not None]
                )
        object.__setattr__(self, "unfreeze", str(self.unfreeze))  # 3 and 0.3 are numbers to whoever does not type them
        if isinstance(self.learning_rate, str) and self.learning_rate != "find":
            raise ConfigError(f"learning_rate is {self.learning_rate!r}; give a number above 0, or find")
        for name, minimum in {
            "epochs": 1,
            "batch": 1,
            "accumulate": 1,
            "views": 1,
            "patience": 0,
            "gradual": 0,
        }.items():
            _check_range(name, getattr(self, name), minimum, None, is_integer=True)
        for name in ("momentum", "warmup", "label_smoothing", "ema", "test", "validation"):
            _check_range(name, getattr(self, name), 0, 1)
        for name in ("weight_decay", "clip", "mixup", "cutmix", "layer_decay"):
            _check_range(name, getattr(self, name), 0, None)
        if not isinstance(self.learning_rate, str):
            _check_range("learning_rate", self.learning_rate, 1e-12, None)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> FineTuneConfig:
        """From keyword arguments; an unknown one is answered with the nearest."""
        check_names("setting", settings, [f.name for f in fields(cls)])
        if settings.get("weights") == "none":  # an untrained network learns nothing with most of it frozen
            settings = {"unfreeze": "all", "batch_norm": "trained", **settings}
        return cls(**settings)


def _check_range(
    name: str, value: object, minimum: float, upper_bound: float | None, *, is_integer: bool = False
) -> None:
    """Refuse what is no number from ``least`` up to, and without, ``below``."""
    allowed_types = (int,) if is_integer else (int, float)
    has_valid_type = isinstance(value, allowed_types) and not isinstance(value, bool)
    if not has_valid_type or not minimum <= value or (upper_bound is not None and not value < upper_bound):  # type: ignore[operator]
        kind, upper_text = (
            ("whole number" if is_integer else "number"),
            "" if upper_bound is None else f", below {upper_bound:g}",
        )
        raise ConfigError(f"{name} is {value!r}; give a {kind} of {minimum:g} or more{upper_text}")
