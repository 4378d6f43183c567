"""Modalities: the kinds of samples that featpipe embeds.

`MODALITIES` maps a name to a `Modality`. A `Modality` defines which files are samples, how bytes are decoded to items,
what a Python caller may pass, which items the self-checks use, and what the report shows. All other modules look these
properties up in the table. Importing it loads neither torch nor the optional parts of image codecs.

How to add a modality
---------------------
1. Write ``featpipe/data/modalities/NAME.py`` with a `Modality`, and add it to `MODALITIES`. Import torch, tokenizers
   and similar packages inside the functions that need them. A third-party module can register its row on import:
   ``MODALITIES["number"] = Modality(...)``.
2. Give its backbones a transform that satisfies `featpipe.backbones.SampleTransform`:

   - ``modality``: the key of the row.
   - ``prepare(item)``: one item → one tensor, in a worker thread (resize and crop; tokenize).
   - ``collate(tensors)``: prepared items → one batch, a tensor whose first axis is the batch axis. Additional data of
     an item (a mask) is packed into the same tensor, and the network unpacks it.
   - ``normalize(batch)``: the remaining operations, for a whole batch, on the device.
   - ``__call__(item)``: ``prepare`` and ``normalize`` of a single item.
   - ``input_shape`` and ``input_dtype``: shape and dtype of one sample as the network expects it. Floating-point input
     is cast to the precision of the engine; integer input (token ids) is not.
   - ``to_dict()``: the parameters that determine the result. They are part of the identity of every embedding.

   The modules in ``featpipe.backbones.sources`` create the transforms of the library backbones. A user passes a
   transform to ``featpipe.backbones.load(network, transform=...)``.
3. Run ``tests/contract/test_modalities.py``. It registers a small second modality and runs extraction, training,
   prediction and the report with it.

The index of an archive lists the samples of the backbone's modality; other files are counted as ignored. Manifests
state the modality unless it is ``image``. Fine-tuning, augmentation and resizing on CUDA support only images.
"""

from __future__ import annotations

from featpipe.config import unknown_name_error
from featpipe.data.modalities.image import IMAGE
from featpipe.data.modalities.modality import Modality

__all__ = ["DEFAULT_MODALITY", "MODALITIES", "Modality", "get_modality"]

DEFAULT_MODALITY = "image"

MODALITIES: dict[str, Modality] = {"image": IMAGE}


def get_modality(name: str) -> Modality:
    """Look up a modality; raises ConfigError for an unknown name."""
    if name not in MODALITIES:
        raise unknown_name_error("modality", name, MODALITIES)
    return MODALITIES[name]
