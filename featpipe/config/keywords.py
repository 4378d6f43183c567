"""Typed keywords of the public functions (PEP 692): editors complete them, and type checkers find misspelt ones.

A contract test compares each class with the settings class or the function whose keywords it lists.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from featpipe.config.stages import (
    BadImageLimit,
    EngineName,
    FineTuneOptimizer,
    FineTuneSchedule,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Precision,
    ResamplingMethod,
    Storage,
    TimeLimit,
    UnitInterval,
)
from featpipe.runtime import ProgressCallback


class ExtractionOptions(TypedDict, total=False):
    """Keywords for the fields of :class:`featpipe.config.ExtractionConfig`."""

    backbone: Any
    weights: str | os.PathLike[str] | None
    outputs: Sequence[str]
    transform: Any
    seed: int
    labels: Any
    device: str
    precision: Precision | Literal["auto"]
    min_cosine: UnitInterval
    engine: EngineName
    storage: Storage
    cache: str | os.PathLike[str]
    out: str | os.PathLike[str] | None
    overwrite: bool
    shard_bytes: PositiveInt
    workers: PositiveInt | None
    batch: PositiveInt | None
    max_bad: BadImageLimit | None
    time_limit: TimeLimit | None
    check_content: bool


class ComparisonOptions(TypedDict, total=False):
    """Keywords for the fields of :class:`featpipe.config.TrainingConfig` that several heads share."""

    cv: NonNegativeInt | None
    output: str | None
    tune: bool | None
    grid: Mapping[str, Sequence[object]] | None
    metric: str | None
    one_standard_error: bool
    balance: ResamplingMethod | None
    calibrate: bool
    prior: Mapping[str, float] | None
    groups: Any
    times: Any
    since: Any
    without: str | os.PathLike[str] | None
    memory: NonNegativeInt | None
    keep: str | None
    jobs: int | None
    random_state: int | None


class TrainingOptions(ComparisonOptions, total=False):
    """Keywords for the fields of :class:`featpipe.config.TrainingConfig`, the head excepted."""

    params: Mapping[str, object] | None
    findings: str | os.PathLike[str] | None


class FineTuneOptions(TypedDict, total=False):
    """Keywords for the fields of :class:`featpipe.config.FineTuneConfig`."""

    unfreeze: str | int | float
    weights: Literal["none"] | None
    gradual: NonNegativeInt
    batch_norm: Literal["frozen", "trained"]
    epochs: PositiveInt
    batch: PositiveInt
    accumulate: PositiveInt
    optimizer: FineTuneOptimizer
    learning_rate: PositiveFloat | Literal["find"]
    layer_decay: NonNegativeFloat
    momentum: Fraction
    weight_decay: NonNegativeFloat
    warmup: Fraction
    schedule: FineTuneSchedule
    clip: NonNegativeFloat
    precision: Literal["fp32", "bf16", "fp16"]
    label_smoothing: Fraction
    mixup: NonNegativeFloat
    cutmix: NonNegativeFloat
    augmentation: Mapping[str, Any]
    class_weight: Literal["balanced"] | None
    sampling: Literal["balanced"] | None
    ema: Fraction
    patience: NonNegativeInt
    monitor: Literal["score", "loss"]
    test: Fraction
    validation: Fraction
    cache_activations: Literal["auto", "yes", "no"]
    views: PositiveInt
    seed: int
    device: str
    workers: PositiveInt | None
    keep_worse: bool


class FineTuneKeywords(FineTuneOptions, total=False):
    """Keywords of :func:`featpipe.finetune`."""

    labels: Any
    cache: str | os.PathLike[str]
    out: str | os.PathLike[str] | None
    resume: bool
    tensorboard: str | os.PathLike[str] | None
    progress: ProgressCallback


class ExpandKeywords(TypedDict, total=False):
    """Keywords of :func:`featpipe.expand`."""

    method: str | None
    memory: int | None
    budget: int | None
    drop: Sequence[str]
    merge: Mapping[str, Sequence[str]] | None
    test: Any
    calibration: Any
    keep: str | None
    params: Mapping[str, object] | None
    labels: Any
    cache: str | os.PathLike[str]
    unfreeze: str | int | float
    resume: bool
    out: str | os.PathLike[str] | None
    place: Callable[[Path, int], Path] | None
    progress: ProgressCallback
