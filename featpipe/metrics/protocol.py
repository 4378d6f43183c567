"""How a score was measured: data in models and results, text where it is shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TEMPLATES = {
    "folds": "{folds}-fold cross-validation on the {n} training images",
    "time_spans": "{folds} time spans, each predicted from the earlier ones: {n:,} of {n_rows:,} training images",
    "since": "fitted on images before {since}, scored on the {n:,} images since then",
    "inner_folds": "best of {candidates} on {folds} inner folds of {n:,} rows",
    "not_tuned": "not tuned: a class has a single image",
    "holdout": "{n} images held out",
    "unseen": "{n:,} images that were not trained on",
    "given": "{n:,} given test images",
    "new_holdout": "{n:,} new images, held out and trained on afterwards",
    "given_and_new_holdout": "{given:,} given test images and {n:,} new images, held out and trained on afterwards",
    "none": "no test images",
}


def format_protocol(protocol: Mapping[str, Any] | str) -> str:
    """Describe how scores were measured, or settings compared.

    Parameters
    ----------
    protocol : mapping or str
        What models and results hold under ``how``: a ``kind`` and its numbers. Older files hold the text itself.

    Examples
    --------
    >>> format_protocol({"kind": "folds", "folds": 5, "n": 90, "groups": 30})
    '5-fold cross-validation on the 90 training images, 30 groups kept together'
    """
    if isinstance(protocol, str):
        return protocol
    text = _TEMPLATES[protocol["kind"]].format_map(protocol)
    text += f", {protocol['groups']:,} groups kept together" if "groups" in protocol else ""
    return text + (f", and scaled to {protocol['scaled_to']:,}" if "scaled_to" in protocol else "")
