"""Settings of the stages, with the defaults that commands, recipes and Python share."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal, Self, get_args

from featpipe.config.validation import Range, Settings
from featpipe.errors import ConfigError
from featpipe.runtime import parse_duration

AUTO: Final = "auto"
Task = Literal["classification", "regression", "multilabel"]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Storage = Literal["float32", "float16"]
EngineName = Literal["auto", "torch", "openvino"]
ResamplingMethod = Literal["over", "under", "smote"]
FineTuneOptimizer = Literal["adamw", "sgd"]
FineTuneSchedule = Literal["cosine", "one-cycle", "constant"]
TASKS: tuple[Task, ...] = get_args(Task)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
STORAGES: tuple[Storage, ...] = get_args(Storage)
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
RESAMPLING_METHODS: tuple[ResamplingMethod, ...] = get_args(ResamplingMethod)
# Neural heads have those of fine-tuning, and more; the formulas differ in warm-up and rounding.
HEAD_OPTIMIZERS: tuple[str, ...] = (*get_args(FineTuneOptimizer), "adam")
HEAD_SCHEDULES: tuple[str, ...] = (*get_args(FineTuneSchedule), "linear", "step")

PositiveInt = Annotated[int, Range(minimum=1)]
NonNegativeInt = Annotated[int, Range(minimum=0)]
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(minimum=0)]
Fraction = Annotated[float, Range(minimum=0, below=1)]
UnitInterval = Annotated[float, Range(minimum=0, maximum=1)]


def compute_bad_image_limit(max_bad: int | float | str | None, n: int) -> int | None:
    """Compute how many of n images may be bad.

    Parameters
    ----------
    max_bad : int, float or str, optional
        A number, or a share: ``0.05`` or ``"5%"``. None is no limit.
    n : int

    Examples
    --------
    >>> compute_bad_image_limit("5%", 200), compute_bad_image_limit(3, 200)
    (10, 3)
    """
    if max_bad is None:
        return None
    value = max_bad
    try:
        if isinstance(value, str) and value.endswith("%"):
            value = float(value[:-1]) / 100
        number = float(value)
    except ValueError:
        raise ConfigError(f"max-bad is {max_bad!r}; give a number or a share such as 5%") from None
    is_share = isinstance(value, float) or (isinstance(value, str) and "." in value)
    if not 0 <= number < float("inf") or (is_share and number > 1):
        raise ConfigError(f"max-bad is {max_bad!r}; a number is at least 0, a share at most 100%")
    return int(number * n) if is_share else int(number)


def _check_bad_image_limit(max_bad: int | float | str) -> None:
    compute_bad_image_limit(max_bad, 0)


TimeLimit = Annotated[float | str, parse_duration]
BadImageLimit = Annotated[int | float | str, _check_bad_image_limit]


@dataclass(frozen=True)
class ExtractionConfig(Settings):
    """Settings of an extraction.

    Parameters
    ----------
    backbone : str or torch.nn.Module or Backbone
        A name that ``featpipe backbones`` lists, ``package.module:factory``, or a network.
    weights : str or path-like, optional
        A published name, a file, or ``"none"`` for random weights; the published default if not given.
    outputs : sequence of str
        The outputs to cache: ``pooled``, or ``NODE[:POOL]``.
    transform : callable, optional
        Transform of a network that is given as a module: uint8 (3, H, W) → float32 (3, h, w).
    seed : int
        For random weights.
    labels : path-like or Table, optional
        A CSV or Parquet table of paths and labels.
    device : str
        ``auto``, ``cpu``, ``cuda`` (all GPUs of the machine), ``cuda:N`` or ``mps``; several are separated by commas,
        and each gets its own process.
    precision : {"fp32", "tf32", "bf16", "fp16", "auto"}
        ``auto`` selects the fastest precision whose embeddings of the first images have a cosine of at least
        ``min_cosine`` to those in fp32.
    min_cosine : float
        The minimum cosine to fp32 for ``precision="auto"``.
    engine : {"auto", "torch", "openvino"}
        The inference engine on a CPU. Like the device, it is not part of the identity of a cache.
    storage : {"float32", "float16"}
        The type of the stored embeddings.
    cache : path-like
        The folder of the caches.
    out : path-like, optional
        File of the cache; if not given, a file in ``cache`` named after archive, backbone and fingerprint.
    overwrite : bool
        Replace a cache at ``out`` whose content differs.
    shard_bytes : int
        Larger embeddings are spread over several files of about this size.
    workers, batch : int, optional
        Worker threads, and images per forward pass; chosen for the machine if not given.
    max_bad : int, float or str, optional
        How many images may fail before the extraction stops: a number, or a share such as ``"5%"`` or ``0.05``. No
        limit if not given.
    time_limit : float or str, optional
        Seconds, or a time such as ``"3h"``, after which the extraction stops; the same call resumes it.
    check_content : bool
        Read every image's bytes, even if size and modification time are unchanged.
    """

    backbone: Any = "efficientnet_lite0"
    weights: str | os.PathLike[str] | None = None
    outputs: Sequence[str] = ("pooled",)
    transform: Any = None
    seed: int = 0
    labels: Any = None
    device: str = "auto"
    precision: Precision | Literal["auto"] = "fp32"
    min_cosine: UnitInterval = 0.999
    engine: EngineName = "auto"
    storage: Storage = "float32"
    cache: str | os.PathLike[str] = "cache"
    out: str | os.PathLike[str] | None = None
    overwrite: bool = False
    shard_bytes: PositiveInt = 4 * 2**30
    workers: PositiveInt | None = None
    batch: PositiveInt | None = None
    max_bad: BadImageLimit | None = None
    time_limit: TimeLimit | None = None
    check_content: bool = False

    def get_max_bad_count(self, n: int) -> int | None:
        """How many of n images may be bad; None is no limit."""
        return compute_bad_image_limit(self.max_bad, n)


@dataclass(frozen=True)
class TrainingConfig(Settings):
    """Settings of training a head.

    Parameters
    ----------
    head : str
        A name that ``featpipe heads`` lists, or the import path of a scikit-learn estimator.
    cv : int, optional
        Number of folds for cross-validation on the training rows, before the head is fitted on all of them. Images with
        the same bytes are never on both sides of a fold. None or 0: no cross-validation.
    params : mapping, optional
        Settings of the head, such as ``{"C": 10}``.
    output : str, optional
        Output of the cache to train on; the first if not given.
    tune : bool, optional
        Select settings on inner folds of the training rows. If not given, only the regularization strength ``C`` of
        ``logistic`` is selected, among 45 values from 1e-6 to 1e5, unless ``params`` sets it.
    grid : mapping from setting to values, optional
        Values to try, instead of the default grid of the head.
    metric : str, optional
        The metric that selects settings, one of :data:`featpipe.metrics.SELECTION_METRICS`; the first of the task if
        not given.
    one_standard_error : bool
        Choose the smallest ``C`` whose score is within one standard error of the best.
    balance : {"over", "under", "smote"}, optional
        Resample the training rows of each fit so that all classes are equally frequent.
    calibrate : bool
        Fit a temperature on the predictions of the folds, which calibrates the probabilities. Always done for heads
        that give scores instead of probabilities.
    prior : mapping from class to share, optional
        Class frequencies where the model will be used; probabilities are corrected for them.
    groups : str or array-like of shape (n,), optional
        The group of each sample of the cache, such as a patient. A group is never on both sides of a fold.
        ``TABLE:COLUMN`` reads the groups from a table.
    times : str or array-like of shape (n,), optional
        The time of each sample, given like `groups`. Each fold is scored on samples that are later than its training
        samples.
    since : str, number or date, optional
        With ``times``: instead of folds, fit once on the earlier images and score on the images of that time or later.
        The model is then fitted on all of them.
    without : path-like, optional
        A table of images to leave out, such as one of an evaluation's findings.
    memory : int, optional
        Bytes that training may use; larger features stay in the file and are read in each pass.
    keep : str, optional
        Data that a classifier retains for class-incremental learning: ``none``, ``all``, or some of ``statistics``,
        ``importances`` and ``rows=N`` (embeddings of each class), separated by commas. If not given: statistics and
        importances, or nothing if the features stay in the file.
    jobs : int, optional
        Processes for ``tune``, as joblib counts them.
    random_state : int or None
    findings : path-like, optional
        Folder for tables of training images to inspect: likely label errors, mistakes and uncertain predictions. Each
        image is predicted by a head that was not fitted on it.
    """

    head: str = "logistic"
    cv: NonNegativeInt | None = None
    params: Mapping[str, object] | None = None
    output: str | None = None
    tune: bool | None = None
    grid: Mapping[str, Sequence[object]] | None = None
    metric: str | None = None
    one_standard_error: bool = False
    balance: ResamplingMethod | None = None
    calibrate: bool = False
    prior: Mapping[str, float] | None = None
    groups: Any = None
    times: Any = None
    since: Any = None
    without: str | os.PathLike[str] | None = None
    memory: NonNegativeInt | None = None
    keep: str | None = None
    jobs: int | None = None
    random_state: int | None = 0
    findings: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cv == 1 and self.since is None:
            raise ConfigError("cv is 1; give 2 folds or more, or 0 for no cross-validation")


@dataclass(frozen=True)
class FineTuneConfig(Settings):
    """Settings of fine-tuning.

    Parameters
    ----------
    unfreeze : str, int or float
        Which part of the backbone is trained: ``head`` (none), ``last``, ``3`` or ``3 stages``, ``0.3`` (that share of
        the stages), ``all``, ``layers[15:]`` (a slice of the layers with weights, counted from the input), or a glob of
        module names such as ``blocks.6*``; several are separated by commas.
    weights : str, optional
        ``none`` starts from random weights and a new head, and trains the whole network.
    gradual : int
        Number of epochs after which one more stage is unfrozen; the head is trained alone at first. 0 trains
        everything from the start.
    batch_norm : {"frozen", "trained"}
        Whether the batch norms of the trained part keep their running statistics or update them.
    epochs : int
        Maximum number of epochs.
    batch : int
        Images per optimizer step.
    accumulate : int
        Number of forward passes per batch, whose gradients are accumulated; increase it if memory runs out.
    optimizer : {"adamw", "sgd"}
        SGD uses Nesterov momentum.
    learning_rate : float or "find"
        Peak learning rate of the head; ``find`` selects it by a range test on the first batches.
    layer_decay : float
        Factor between the learning rates of the head and the last stage, and of each stage and the one before it.
    momentum : float
    weight_decay : float
        Not applied to norms and biases.
    warmup : float
        Share of the steps during which the learning rate rises.
    schedule : {"cosine", "one-cycle", "constant"}
    clip : float
        Maximum norm of the gradient; 0 disables clipping.
    precision : {"fp32", "bf16", "fp16"}
        Precision of the forward and backward passes; weights and their updates are float32.
    label_smoothing, mixup, cutmix : float
        For mixup and cutmix, alpha of Beta(alpha, alpha) (Zhang et al. 2018, Yun et al. 2019); 0 disables each.
    augmentation : mapping
        Augmentations by the names of :class:`featpipe.finetuning.Augmentation`.
    class_weight, sampling : "balanced", optional
        Weight rare classes more in the loss; draw them more often.
    ema : float
        Decay of an exponential moving average of the weights, which is then evaluated and saved; 0 disables it.
    patience : int
        Stop after this number of epochs without improvement; 0 never stops early. The first epochs, at the highest
        learning rates, are often worse than the start, and the last ones better. The best epoch is selected in any
        case.
    monitor : {"score", "loss"}
        The validation metric that selects the best epoch: accuracy (R² for regression), as in the final comparison,
        with ties broken by the loss; or the loss alone, which may rise with a network's confidence while accuracy
        improves.
    test, validation : float
        Share of the images held out for the final comparison, and share of the rest used for validation, if the labels
        come without a split.
    cache_activations : {"auto", "yes", "no"}
        Compute the feature maps of the frozen part once and train on them; ``auto`` does so if it is faster.
    views : int
        Number of augmented views of each image that are cached then; epochs alternate between them.
    seed : int
    device : str
        ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
    workers : int, optional
        Decoding threads; the number of cores if not given.
    keep_worse : bool
        Save the fine-tuned model even if it scores lower than the original one on held-out images.
    """

    unfreeze: str | int | float = "last"
    weights: Literal["none"] | None = None
    gradual: NonNegativeInt = 0
    batch_norm: Literal["frozen", "trained"] = "frozen"
    epochs: PositiveInt = 10
    batch: PositiveInt = 32
    accumulate: PositiveInt = 1
    optimizer: FineTuneOptimizer = "adamw"
    learning_rate: PositiveFloat | Literal["find"] = 3e-4
    layer_decay: NonNegativeFloat = 0.8
    momentum: Fraction = 0.9
    weight_decay: NonNegativeFloat = 0.01
    warmup: Fraction = 0.1
    schedule: FineTuneSchedule = "cosine"
    clip: NonNegativeFloat = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    label_smoothing: Fraction = 0.0
    mixup: NonNegativeFloat = 0.0
    cutmix: NonNegativeFloat = 0.0
    augmentation: Mapping[str, Any] = field(default_factory=dict)
    class_weight: Literal["balanced"] | None = None
    sampling: Literal["balanced"] | None = None
    ema: Fraction = 0.0
    patience: NonNegativeInt = 0
    monitor: Literal["score", "loss"] = "score"
    test: Fraction = 0.2
    validation: Fraction = 0.2
    cache_activations: Literal["auto", "yes", "no"] = "auto"
    views: PositiveInt = 4
    seed: int = 0
    device: str = AUTO
    workers: PositiveInt | None = None
    keep_worse: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "unfreeze", str(self.unfreeze))  # 3 and 0.3 may come as numbers

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        if settings.get("weights") == "none":  # an untrained network learns nothing with most of it frozen
            settings = {"unfreeze": "all", "batch_norm": "trained", **settings}
        return super().from_settings(settings)
