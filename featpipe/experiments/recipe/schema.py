"""The tables of a recipe and their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from featpipe.config import (
    ExtractionConfig,
    FineTuneConfig,
    NonNegativeInt,
    PositiveInt,
    Range,
    ResamplingMethod,
    Settings,
    Task,
)
from featpipe.errors import ConfigError

TILES_ARCHIVE = "featpipe:tiles"
"""The built-in archive: tiles of the photographs in scikit-image and scikit-learn."""
ALL_HEADS = "all"
"""Name that stands for every head that supports the task."""


@dataclass(frozen=True)
class SamplesConfig(Settings):
    """The images and their labels: the keys before the first table of a recipe.

    Attributes
    ----------
    archive : tuple of str
        Folders, tar and zip archives, tables of paths; or ``featpipe:tiles``.
    labels : str, optional
        A table of paths and labels.
    path_column, label_column : str, optional
        Columns of the table; detected by name if not given.
    task : {"classification", "regression", "multilabel"}, optional
        Task of the labels; detected if not given.
    images : int, optional
        Maximum number of images; the subset has the class frequencies of the whole.
    """

    archive: tuple[str, ...] = ()
    labels: str | None = None
    path_column: str | None = None
    label_column: str | None = None
    task: Task | None = None
    images: PositiveInt | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels is None and (self.path_column or self.label_column or self.task):
            raise ConfigError("path_column, label_column and task describe a table; give it with labels")


@dataclass(frozen=True)
class SplitConfig(Settings):
    """The split into training and test images.

    Attributes
    ----------
    test : float
        Share of the images held out for testing, if the labels have no split and there is no test archive.
    seed : int
        Seed of the split and of the draws.
    groups, times : str, optional
        ``TABLE:COLUMN``: groups, which are never on both sides of a split; times, which order the images.
    since : str, optional
        With times: the earliest time of the test images.
    without : str, optional
        A table of images to leave out.
    per_class : tuple of int
        Train on this number of images per class instead of all; each number is a row of the table.
    draws : int
        Number of draws, which give the spread.
    """

    test: Annotated[float, Range(above=0, below=1)] = 0.2
    seed: int = 0
    groups: str | None = None
    times: str | None = None
    since: str | None = None
    without: str | None = None
    per_class: tuple[PositiveInt, ...] = ()
    draws: PositiveInt = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.since is not None and self.times is None:
            raise ConfigError(f"since is {self.since!r} without times; give times too")


@dataclass(frozen=True)
class RecipeHead(Settings):
    """One head to train.

    Attributes
    ----------
    name : str
        A name that ``featpipe heads`` lists, an import path, or ``all``.
    settings : mapping
        Settings of the head: the other keys of this table.
    output : str, optional
        Output of the backbone to train on; the first if not given.
    tune : bool, optional
        Select settings on inner folds; if not given, only the regularization strength of ``logistic``.
    grid : mapping from setting to list of values
        The values to try.
    balance : {"over", "under", "smote"}, optional
        Resampling of the training rows.
    table : str
        Name of the table in the recipe, for messages.
    """

    name: str = "logistic"
    settings: Mapping[str, Any] = field(default_factory=dict)
    output: str | None = None
    tune: bool | None = None
    grid: Mapping[str, Any] = field(default_factory=dict)
    balance: ResamplingMethod | None = None
    table: str = field(default="heads.0", compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(not isinstance(values, (list, tuple)) or not values for values in self.grid.values()):
            raise ConfigError("grid lists the values of each setting, as in grid = {C = [0.1, 1]}")
        if self.name == ALL_HEADS and (self.settings or self.grid):
            raise ConfigError("settings and a grid need a single head, and name is 'all'; name the head")


@dataclass(frozen=True)
class RecipeTraining(Settings):
    """The table [training]: how every head is trained.

    Attributes
    ----------
    cv : int
        Number of cross-validation folds of the training images.
    metric : str, optional
        The metric that selects heads and settings; the first of the task if not given.
    seed : int
        Random seed of training.
    calibrate : bool
        Calibrate probabilities.
    prior : mapping from class to share
        Class frequencies where the model will be used.
    one_standard_error : bool
        Select the smallest ``C`` of ``logistic`` within one standard error of the best.
    memory : int, optional
        Bytes that training may use.
    keep : str, optional
        Data that models retain for class-incremental learning.
    jobs : int, optional
        Processes for tuning.
    portable : bool
        Include the backbone's weights in the model files.
    """

    cv: Annotated[int, Range(minimum=2)] = 5
    metric: str | None = None
    seed: int = 0
    calibrate: bool = False
    prior: Mapping[str, Any] = field(default_factory=dict)
    one_standard_error: bool = False
    memory: NonNegativeInt | None = None
    keep: str | None = None
    jobs: int | None = None
    portable: bool = False


@dataclass(frozen=True)
class EvaluationConfig(Settings):
    """The images that the models are scored on.

    Attributes
    ----------
    archive : tuple of str
        Test images; if not given, images are held out.
    labels : str, optional
        Table of their labels.
    findings : bool
        Write tables of likely label errors and other images to inspect.
    """

    archive: tuple[str, ...] = ()
    labels: str | None = None
    findings: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels is not None and not self.archive:
            raise ConfigError("labels are given without archive; give the test images as archive too")


@dataclass(frozen=True)
class ReportConfig(Settings):
    """The report.

    Attributes
    ----------
    title : str, optional
        Names head and backbone if not given.
    """

    title: str | None = None


@dataclass(frozen=True)
class Recipe:
    """An experiment: the settings of every stage.

    Attributes
    ----------
    name : str
        Name of the run's folder.
    where : str
        The file, for messages.
    question : str
        The question that the experiment answers.
    samples : SamplesConfig
    extractions : tuple of ExtractionConfig
        One for each backbone.
    heads : tuple of RecipeHead
    split : SplitConfig
    training : RecipeTraining
    finetune : FineTuneConfig or None
        None skips fine-tuning.
    evaluation : EvaluationConfig
    report : ReportConfig
    """

    name: str
    where: str
    question: str = ""
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    extractions: tuple[ExtractionConfig, ...] = (ExtractionConfig(),)
    heads: tuple[RecipeHead, ...] = (RecipeHead(),)
    split: SplitConfig = field(default_factory=SplitConfig)
    training: RecipeTraining = field(default_factory=RecipeTraining)
    finetune: FineTuneConfig | None = None
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        if self.finetune is not None and (self.split.per_class or self.samples.images is not None):
            raise ConfigError("[finetune] trains on all images; remove images and [split] per_class")
