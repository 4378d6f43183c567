"""Build an ordered index of samples from a folder, a .tar, a .zip, shards, or a table of paths and labels.

**Order.** A folder is sorted by the components of the relative path, compared by Unicode code point. A tar or zip
keeps the order of the archive. Several archives keep the order given; the matches of a glob are sorted like a
folder. The order does not depend on file system, locale or platform.

**Samples.** A file is a sample if its name ends in one of the suffixes of the modality (`MODALITIES`). Names that
begin with a dot, ``__MACOSX`` and files with other suffixes are counted in ``ignored``. In folders, links are
followed; cycles are detected. In a tar, a hard link to an earlier regular member has the bytes of that member.
Other links, devices and sparse members keep a row with a fault.

**Ids.** An id is the path within the archive with ``/`` as the separator, without leading ``./`` and ``/``. ``..``
is kept as text and is never resolved. With several archives, the id is prefixed with the name of the archive and
``/``. The name is the last component of the archive's path, or as many components as make the names unique.
Duplicate ids get the suffixes ``#2``, ``#3``, … Undecodable bytes become backslash escapes in the id; the original
bytes are used for reading.

**Labels** come from the first of these sources that applies:

1. A table that the caller passes. Its rows match samples by id, by path within the archive, by path relative to the
   table's folder, or by absolute path. Samples that the table does not name have no label. Every name in the table
   must be a sample.
2. Sidecar files. Files whose paths are equal up to the first dot of the file name belong together: ``key.cls`` (a
   class) or ``key.json`` (the first of the keys ``label``, ``class``, ``cls``, ``target``, ``labels``) labels
   ``key.jpg``. If one sample of an argument has such a label, the folders of that argument are not used as labels.
3. Folders. The first level below the archive's root is the class. Folders of the same name at deeper levels are not
   merged. Images beside the class folders have no label; without folders no image has one. If all members of a tar
   or zip (or of the shards of one argument) lie in one top folder that itself contains folders of images, that top
   folder is the root.

**Interpretation of labels.** Several label columns in a table are regression targets. A column named ``labels``, or
a column of lists, holds several labels per sample, separated by ``;`` or ``|``. Numbers in a column ``target``,
``targets`` or ``y``, and numbers that are not all integers, are regression targets; a mix of numbers and words in
one of these three columns is an error. All other values are classes. An empty cell means no label. A column
``split`` holds ``train``, ``validation`` (``val``, ``valid``, ``dev``) or ``test``.

**Other arguments.** The rows of a table of paths are the samples, in the table's order; all files must exist. A
single image is one sample without a label, and its id is the path as given.

**Untrusted archives.** Members are read in place and never extracted. An archive that is damaged, truncated, has
overlapping entries or decompresses beyond the limits raises an error; samples are never dropped silently. A single
bad member keeps its row, with a fault.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from featpipe.data.index import Index, SampleReader, index, index_files
from featpipe.data.labels.infer import RawLabels, parse_number
from featpipe.data.labels.labels import Labels, LabelTask, order_classes
from featpipe.data.labels.table import (
    TABLE_SUFFIXES,
    LabelTable,
    TableRows,
    match_table_rows,
    read_column,
    read_column_names,
    read_paths,
)
from featpipe.data.modalities import DEFAULT_MODALITY, MODALITIES, Modality, get_modality
from featpipe.data.sources.glob import expand_paths
from featpipe.data.sources.listing import ArchiveLimits, ArchiveSource, escape_name, format_name
from featpipe.data.sources.sidecars import LabelValue
from featpipe.runtime import lazy_imports

if TYPE_CHECKING:
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
else:
    __getattr__, __dir__ = lazy_imports(__name__)

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
    "read_column_names",
    "read_paths",
    "resize_image",
    "to_rgb",
    "write_tiles",
]
