"""The input of a method: the old head, the retained data, and the new rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.pipeline import Pipeline

from featpipe.config import check_choice, check_integer, check_names, check_number
from featpipe.errors import ConfigError
from featpipe.heads import (
    LastLayer,
    get_base_head,
    get_l2_strength,
    merge_class_scores,
    merge_last_layer_rows,
    resolve_last_layer,
)
from featpipe.incremental.dataset import ClassMapping
from featpipe.incremental.last_layer_loss import Array
from featpipe.metrics import compute_logits
from featpipe.model import EXEMPLAR_SELECTORS, ReplayMemory, compute_penultimate_features, select_exemplars
from featpipe.training import EmbeddingDataset


@dataclass(frozen=True)
class ExpansionConfig:
    """Settings of the methods.

    Attributes
    ----------
    memory : int
        Exemplars of each old class that ``replay`` trains on.
    selection : {"herding", "random"}
        How exemplars are selected.
    epochs : int
        At most.
    temperature : float
        Of the soft targets of ``distill``.
    strength : float or None
        Weight of the soft targets of ``distill``, or of the importances of ``ewc``; None for the method's default.
    """

    memory: int = 20
    selection: str = "herding"
    epochs: int = 200
    temperature: float = 2.0
    strength: float | None = None

    @classmethod
    def from_params(cls, params: Mapping[str, object]) -> Self:
        """From user settings, validated.

        Raises
        ------
        ConfigError
            If a setting is unknown or out of range.
        """
        check_names("setting", params, [field.name for field in fields(cls)], "(of expand)")
        settings = cls(**params)  # type: ignore[arg-type]
        try:
            check_integer("memory", settings.memory, minimum=1)
            check_choice("selection", settings.selection, EXEMPLAR_SELECTORS)
            check_integer("epochs", settings.epochs, minimum=1)
            check_number("temperature", settings.temperature, above=0)
            if settings.strength is not None:
                check_number("strength", settings.strength, minimum=0)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return settings


@dataclass(frozen=True, eq=False)
class IncrementalStep:
    """The input of a method.

    Attributes
    ----------
    pipeline : Pipeline
        The old head, with its scaler.
    temperature : float
        Its logits are divided by it before the softmax.
    class_mapping : ClassMapping
    replay_memory : ReplayMemory or None
        The retained data of its training rows, by the codes of the new classes.
    new, old : EmbeddingDataset
        Rows to train on, and rows that the model was trained on: all, some or none of them.
    has_all_old_rows : bool
        Whether ``old`` are all rows that the model was trained on.
    settings : ExpansionConfig
    """

    pipeline: Pipeline
    temperature: float
    class_mapping: ClassMapping
    replay_memory: ReplayMemory | None
    new: EmbeddingDataset
    old: EmbeddingDataset
    has_all_old_rows: bool
    settings: ExpansionConfig

    @property
    def k(self) -> int:
        return len(self.class_mapping.classes)

    @property
    def k_old(self) -> int:
        return self.class_mapping.k_old

    @cached_property
    def layer(self) -> LastLayer | None:
        """The last layer of the old head, for the new class codes; None if it has none."""
        old_layer = resolve_last_layer(self.pipeline[-1])
        return None if old_layer is None else merge_last_layer_rows(old_layer, self.class_mapping.new_codes, self.k_old)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Known number of images of each class that the model was trained on, shape (k,)."""
        return np.bincount(self.old.y, minlength=self.k) if self.replay_memory is None else self.replay_memory.counts

    def compute_features(self, X: NDArray[Any]) -> Array:
        """The input of the last layer, shape (m, p)."""
        if not len(X):
            return np.zeros((0, X.shape[1] if self.layer is None else self.layer.W.shape[1]))
        return np.asarray(compute_penultimate_features(self.pipeline, X), np.float64)

    def compute_old_scores(self, X: NDArray[Any]) -> Array:
        """Logits of the old head, by the new class codes, shape (m, k_old)."""
        if not len(X):
            return np.zeros((0, self.k_old))
        return merge_class_scores(compute_logits(self.pipeline, X), self.class_mapping.new_codes, self.k_old)

    def select_old_exemplars(self) -> NDArray[np.intp]:
        """The rows of `old` that represent their classes, the best of each class first."""
        Z, settings = self.compute_features(self.old.features), self.settings
        return select_exemplars(settings.selection, Z, self.old.y, settings.memory)

    @cached_property
    def ridge(self) -> float:
        return get_l2_strength(get_base_head(self.pipeline[-1]))

    def make_unfitted(self) -> Pipeline:
        """An unfitted copy of the scaler and of the base head."""
        scaler, head = self.pipeline[0], clone(get_base_head(self.pipeline[-1]))
        weights, new_codes = getattr(head, "class_weight", None), self.class_mapping.new_codes
        if isinstance(weights, Mapping):
            remapped = {int(new_codes[code]): weight for code, weight in weights.items() if new_codes[code] >= 0}
            head.set_params(class_weight=remapped)
        return Pipeline([("scale", scaler if scaler == "passthrough" else clone(scaler)), ("head", head)])
