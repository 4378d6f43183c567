"""The settings of one head and of the search for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from featpipe import heads
from featpipe.config import unknown_name_error
from featpipe.errors import ConfigError
from featpipe.metrics import SELECTION_METRICS


@dataclass(frozen=True)
class HeadConfig:
    """How to fit a head.

    Attributes
    ----------
    head : str
    task : {"classification", "regression", "multilabel"}
    params : mapping
        Settings of the head; class weights by class code.
    grid : mapping from setting to values
        Values to try; if empty and `tune` is true, the head's default grid.
    tune : bool or None
        Search settings. None searches only the penalty strength of ``logistic``, unless `params` sets it.
    metric : str or None
        One of :data:`featpipe.metrics.SELECTION_METRICS`; None is the task's default.
    one_standard_error : bool
        Select the strongest penalty whose score is within one standard error of the best.
    balance : {"over", "under", "smote"} or None
        How the rows of each fit are resampled, see :func:`featpipe.heads.resample`.
    random_state : int or None
    jobs : int or None
        Processes of the search, as joblib counts them.
    """

    head: str
    task: str
    params: Mapping[str, object] = field(default_factory=dict)
    grid: Mapping[str, Sequence[object]] = field(default_factory=dict)
    tune: bool | None = None
    metric: str | None = None
    one_standard_error: bool = False
    balance: str | None = None
    random_state: int | None = 0
    jobs: int | None = None

    def validate(self) -> None:
        """Refuse invalid settings before any work.

        Raises
        ------
        ConfigError
        """
        grid = self.resolve_grid()
        candidates = [{**self.params, key: value} for key, values in grid.items() for value in values]
        for params in candidates or [dict(self.params)]:
            heads.build(self.head, self.task, params=params, random_state=self.random_state)
        if self.metric is not None and self.metric not in SELECTION_METRICS[self.task]:
            raise unknown_name_error("metric", self.metric, SELECTION_METRICS[self.task])
        if self.one_standard_error and not self.searches_path:
            raise ConfigError(
                "one_standard_error is for the search of C of head logistic; use it without C and without grid"
            )
        if self.balance and self.task != "classification":
            raise ConfigError(f"balance={self.balance} is for classification, not for {self.task}")

    @property
    def searches_path(self) -> bool:
        """Whether the penalty strength of ``logistic`` is searched along its regularization path."""
        return (
            self.head == "logistic"
            and not self.grid
            and self.tune is not False
            and not {"C", "head__C"} & set(self.params)
            and self.params.get("penalty") in (None, "l2")
        )

    def resolve_grid(self) -> Mapping[str, Sequence[object]]:
        """The grid to search; empty if there is none.

        Raises
        ------
        ConfigError
            If the head has no default grid left to search.
        """
        if self.grid or not self.tune or self.searches_path:
            return self.grid
        default_grid = heads.get_spec(self.head).grid
        grid = {key: values for key, values in default_grid.items() if not {key, f"head__{key}"} & set(self.params)}
        if not grid:
            raise ConfigError(
                f"head {self.head!r} has no settings left to tune; give the values to try: --grid SETTING=A,B"
            )
        return grid
