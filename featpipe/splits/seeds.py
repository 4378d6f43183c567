"""The seeds of every split and every subset that featpipe draws."""

from __future__ import annotations

from enum import IntEnum


class SplitSeed(IntEnum):
    """The seed of each kind of split, so that the rows of different splits are independent of each other.

    Results depend on these seeds: the numbers never change, and ``random_state`` does not replace them.
    """

    TEST = 0
    """Folds and hold-outs on which scores are reported, and subsets that only save time."""
    INNER_FOLDS = 1
    """Inner folds, on which settings are chosen."""
    EARLY_STOPPING = 2
    """Validation rows for early stopping of a neural head."""
    NOVELTY = 3
    """Rows that the out-of-distribution score is fitted on."""
    FINETUNING_TEST = 4
    """Rows on which a fine-tuned backbone is compared with the frozen one."""
    FINETUNING_VALIDATION = 5
    """Validation rows for early stopping of fine-tuning."""
    LEARNING_CURVE = 1
    """The first draw of a learning curve's subsets; further draws use the following numbers."""
