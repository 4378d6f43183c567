"""The seeds of every split and every subset that featpipe draws."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["SplitSeed"]


class SplitSeed(IntEnum):
    """What rows are drawn for; each purpose has a seed of its own, so that its rows are independent of the others'.

    A seed is part of what a result means: the numbers never change, and ``random_state`` does not replace them.
    """

    TEST = 0
    """Folds and hold-outs that a score is reported for, and subsets that only save time."""
    INNER_FOLDS = 1
    """Inner folds, on which settings are chosen."""
    EARLY_STOPPING = 2
    """Rows on which a neural head decides when to stop."""
    NOVELTY = 3
    """Rows that the out-of-distribution score is fitted on."""
    FINETUNING_TEST = 4
    """Rows on which a fine-tuned backbone is compared with the frozen one."""
    FINETUNING_VALIDATION = 5
    """Rows on which fine-tuning decides when to stop."""
    LEARNING_CURVE = 1
    """The first draw of a learning curve's parts; further draws take the numbers after it."""
