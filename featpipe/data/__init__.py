"""A folder, .tar, .zip, shards, or a table of paths and labels to an ordered index of samples.

**Order.** A folder: by the components of the relative path, compared by Unicode code point. A tar or zip:
the order in the archive. Several archives: the order given; what a glob matches is sorted like a folder.
Nothing depends on file system, locale or platform.

**Samples.** A file is a sample if its name ends in one of the suffixes of the modality (`MODALITIES`).
Names beginning with a dot,
``__MACOSX`` and other suffixes are counted in ``ignored``. In folders links are followed, but never in a
circle. In a tar, a hard link to an earlier regular member has that member's bytes; other links, devices and
sparse members keep a row with a fault.

**Ids.** The path within the archive with ``/`` between its parts, without leading ``./`` and ``/``; ``..``
stays as text and never leads anywhere. With several archives, the archive's name and ``/`` go before it:
its last component, or as many as make the names differ. An id that is there already gets ``#2``, ``#3``, …
Undecodable bytes become backslash escapes; reading uses the real ones.

**Labels**, in this order:

1. From the table that is asked for. Its rows match samples by id, by path within the archive, by path
   relative to the table's folder, or by absolute path. What it does not name has no label, and what it
   names must be a sample.
2. From sidecar files: files whose paths agree up to the first dot of the file name belong together, so
   ``key.cls`` (a class) or ``key.json`` (under ``label``, ``class``, ``cls``, ``target`` or ``labels``, the
   first that is there) labels ``key.jpg``. If one sample of an argument has such a label, folders do not
   count for that argument.
3. From folders: the first level below the archive's root is the class. Folders of the same name deeper down
   are not merged. Images beside the class folders have no label; without any folder nothing has one. If all
   of a tar or zip (or of the shards of one argument) lies in one top folder that itself holds folders of
   images, that is the root.

**What labels mean.** In a table, several columns are targets of a regression. A column ``labels``, or of
lists, holds several labels each, separated by ``;`` or ``|``. Numbers under ``target``, ``targets`` or
``y``, and numbers that are not all whole, are targets of a regression; numbers and words together under
those three names are an error. Everything else is a class. An empty cell is no label. A column ``split``
says ``train``, ``validation`` (``val``, ``valid``, ``dev``) or ``test``.

**Other arguments.** A table of paths: its rows, in its order, are the samples; all must exist. A single
image: a sample without label, whose id is the path as given.

**Trust.** Members are read where they lie, never extracted. An archive that is damaged, ends early,
overlaps itself or unfolds without measure is an error, never fewer samples; one bad member keeps its row,
with its fault.
"""

from __future__ import annotations

from featpipe.data.demo_tiles import TILE_SIZE, write_tiles
from featpipe.data.image import (
    BACKGROUND,
    ImageLimits,
    compute_resize_weights,
    decode_image,
    encode_jpeg,
    encode_png,
    encode_preview,
    encode_thumbnail,
    resize_image,
    to_rgb,
)
from featpipe.data.index import Index, SampleReader, index, index_files
from featpipe.data.labels.infer import RawLabels, parse_number
from featpipe.data.labels.labels import Labels, LabelTask, order_classes
from featpipe.data.labels.table import TABLE_SUFFIXES, LabelTable, TableRows, match_table_rows, read_column, read_paths
from featpipe.data.modalities import DEFAULT_MODALITY, MODALITIES, Modality, get_modality
from featpipe.data.sources.glob import expand_paths
from featpipe.data.sources.listing import ArchiveLimits, ArchiveSource, escape_name, format_name
from featpipe.data.sources.sidecars import LabelValue

__all__ = [
    "BACKGROUND",
    "DEFAULT_MODALITY",
    "MODALITIES",
    "TABLE_SUFFIXES",
    "TILE_SIZE",
    "ArchiveLimits",
    "ArchiveSource",
    "ImageLimits",
    "Index",
    "LabelTable",
    "LabelTask",
    "LabelValue",
    "Labels",
    "Modality",
    "RawLabels",
    "SampleReader",
    "TableRows",
    "compute_resize_weights",
    "decode_image",
    "encode_jpeg",
    "encode_png",
    "encode_preview",
    "encode_thumbnail",
    "escape_name",
    "expand_paths",
    "format_name",
    "get_modality",
    "index",
    "index_files",
    "match_table_rows",
    "order_classes",
    "parse_number",
    "read_column",
    "read_paths",
    "resize_image",
    "to_rgb",
    "write_tiles",
]
