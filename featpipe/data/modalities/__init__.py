"""Modalities: the kinds of samples that featpipe embeds.

`MODALITIES` maps a name to a `Modality`. It is the only place that knows what a kind of sample is: which files are
samples, how bytes become items, what a Python caller may pass, which items the self-checks use, and what the report
shows. Everything else asks the table. Importing it loads neither torch nor an image codec's extras.

How to add a modality
---------------------
1. Write ``featpipe/data/modalities/NAME.py`` with a `Modality`, and add it to `MODALITIES`. Import torch, tokenizers
   and the like inside the functions that need them. A module outside of featpipe may add its row when it is imported:
   ``MODALITIES["number"] = Modality(...)``.
2. Give its backbones a transform that satisfies `featpipe.backbones.SampleTransform`:

   - ``modality``: the key of the row.
   - ``prepare(item)``: the item → one tensor, in a worker thread, one item at a time (resize and crop; tokenize).
   - ``collate(tensors)``: prepared items → one batch, a tensor whose first axis counts the items. What an item has
     besides its main tensor (a mask) is packed into the same tensor; the network takes it apart again.
   - ``normalize(batch)``: the rest, for a whole batch at once, on the device.
   - ``__call__(item)``: ``prepare`` and ``normalize`` of a single item.
   - ``input_shape`` and ``input_dtype``: of one sample, as the network takes it. Floating-point input is cast to the
     precision of the engine; integer input (token ids) never is.
   - ``to_dict()``: what decides the result. It is part of the identity of every embedding.

   The transform of a library's backbone is made by its source in ``featpipe.backbones.sources``. A user passes one to
   ``featpipe.backbones.load(network, transform=...)``.
3. Run ``tests/contract/test_modalities.py``. It registers a small second modality and extracts, trains, predicts and
   reports with it.

The index of an archive lists the samples of one modality, that of the backbone; other files are counted as ignored.
Manifests name the modality where it is not ``image``. Fine-tuning, augmentation and CUDA's resizing are for images.
"""

from __future__ import annotations

from featpipe.config import unknown_name_error
from featpipe.data.modalities.image import IMAGE
from featpipe.data.modalities.modality import Modality

__all__ = ["DEFAULT_MODALITY", "MODALITIES", "Modality", "get_modality"]

DEFAULT_MODALITY = "image"

MODALITIES: dict[str, Modality] = {"image": IMAGE}


def get_modality(name: str) -> Modality:
    """The row of the table; ConfigError for a name that is not in it."""
    if name not in MODALITIES:
        raise unknown_name_error("modality", name, MODALITIES)
    return MODALITIES[name]
