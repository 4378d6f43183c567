"""The tables of a recipe: what each stage is asked for, and the defaults of what is not said."""

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

__all__ = [
    "ALL_HEADS",
    "TILES_ARCHIVE",
    "EvaluationConfig",
    "Recipe",
    "RecipeHead",
    "RecipeTraining",
    "ReportConfig",
    "SamplesConfig",
    "SplitConfig",
]

TILES_ARCHIVE = "featpipe:tiles"
"""The archive that comes along: tiles of the photographs in scikit-image and scikit-learn."""
ALL_HEADS = "all"
"""The head that stands for every head which does the task."""


@dataclass(frozen=True)
class SamplesConfig(Settings):
    """Which images, and what is known of them: the keys before the first table of a recipe.

    Attributes
    ----------
    archive : tuple of str
        Folders, tar and zip archives, tables of paths; or ``featpipe:tiles``.
    labels : str, optional
        A table of paths and labels.
    path_column, label_column : str, optional
        Its columns, found by their names if not given.
    task : {"classification", "regression", "multilabel"}, optional
        What the labels are; told from them if not given.
    images : int, optional
        So many of them at most, with the mix of labels that all have.
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
    """Which images are learnt from, and which a score is reported for.

    Attributes
    ----------
    test : float
        The share that is held out, where the labels bring no split of their own and no other archive is scored.
    seed : int
        Of that split, and of the draws.
    groups, times : str, optional
        ``TABLE:COLUMN``: what keeps images on one side, or orders them.
    since : str, optional
        With times: the earliest of the images that are held out.
    without : str, optional
        A table of images to leave out.
    per_class : tuple of int
        Learn from so many images of each class, in place of all of them; each number is a row of the table.
    draws : int
        How often they are drawn, for the spread.
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
            raise ConfigError(f"since is {self.since!r}, and nothing says when images were made; give times too")


@dataclass(frozen=True)
class RecipeHead(Settings):
    """One head to train.

    Attributes
    ----------
    name : str
        A name that ``featpipe heads`` lists, an import path, or ``all``.
    settings : mapping
        Of the head, beside the keys of this table.
    output : str, optional
        Which of the backbone's outputs; the first if not given.
    tune : bool, optional
        Choose settings on inner folds; of ``logistic`` alone its strength, if not given.
    grid : mapping from setting to list of values
        What is tried.
    balance : {"over", "under", "smote"}, optional
        How rows are resampled.
    table : str
        Where in the recipe it stands, for messages.
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
            raise ConfigError("grid lists what is tried of each setting, as in grid = {C = [0.1, 1]}")
        if self.name == ALL_HEADS and (self.settings or self.grid):
            raise ConfigError("settings and a grid are of one head, not of all; name it")


@dataclass(frozen=True)
class RecipeTraining(Settings):
    """How every head is trained.

    Attributes
    ----------
    cv : int
        Folds of the training images by which heads are compared.
    metric : str, optional
        What heads and settings are chosen by; the first of the task if not given.
    seed : int
        For what is random in training.
    calibrate : bool
        Make probabilities mean what they say.
    prior : mapping from class to share
        How frequent classes are where the model will be used.
    one_standard_error : bool
        Take the smallest ``C`` of ``logistic`` within a standard error of the best.
    memory : int, optional
        Bytes that training may use.
    keep : str, optional
        What models keep of the training data, so that they can learn more classes.
    jobs : int, optional
        Processes for tuning.
    portable : bool
        Carry the backbone's weights in the files of the models.
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
    """What the models are scored on.

    Attributes
    ----------
    archive : tuple of str
        Other images than those of training; the held-out ones if there are none.
    labels : str, optional
        A table of their labels.
    findings : bool
        Write tables of what to look at next.
    """

    archive: tuple[str, ...] = ()
    labels: str | None = None
    findings: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels is not None and not self.archive:
            raise ConfigError("labels are of an archive to score; give it with archive")


@dataclass(frozen=True)
class ReportConfig(Settings):
    """The page.

    Attributes
    ----------
    title : str, optional
        Made from head and backbone if not given.
    """

    title: str | None = None


@dataclass(frozen=True)
class Recipe:
    """A whole experiment: what each stage is asked for.

    Attributes
    ----------
    name : str
        What the run's folder is called.
    where : str
        The file, for messages.
    question : str
        What it answers.
    samples : Samples
    extractions : tuple of Extraction
        One for each backbone.
    heads : tuple of Head
    split : Split
    training : Training
    finetune : FineTuning or None
        What is asked for of the stage that trains the network too, where there is to be one.
    evaluation : Evaluation
    report : Report
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
            raise ConfigError("[finetune] trains on all of the images; leave images and [split] per_class out")
