"""What a run would do, and what of it is done: archives are listed, caches and records read, and nothing is made."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featpipe.archive import Index
from featpipe.backbone import Backbone
from featpipe.cache import FeatureCache, parts_directory
from featpipe.commit import Parts
from featpipe.engine import resolve_devices
from featpipe.extraction import facts_of, load_backbone
from featpipe.extraction.ledger import Ledger, source_of_part
from featpipe.extraction.places import caches_for, existing_at, is_cache_of
from featpipe.fingerprint import fingerprint
from featpipe.known import Source
from featpipe.pipeline.embedding import Caches, cache_path
from featpipe.pipeline.running import Line, attempts, folder_named, tiles_of
from featpipe.pipeline.trials import label_of, trials_of
from featpipe.progress import quiet
from featpipe.recipe import AUTO, Extraction, Recipe, read_recipe

__all__ = ["Foreseen", "ToEmbed", "ToTrain", "foresee"]


@dataclass(frozen=True)
class ToEmbed:
    """The images of one backbone.

    Attributes
    ----------
    backbone : str
    cache : str
    images : int
        Those that are scored alone included.
    unknown : int or None
        That no cache knows by place, size and time. Their bytes are read, and embedded unless a cache knows these. None
        where the precision is to be chosen first.
    """

    backbone: str
    cache: str
    images: int
    unknown: int | None


@dataclass(frozen=True)
class ToTrain:
    """One row of the table.

    Attributes
    ----------
    name : str
    trained, scored : bool
        Whether that is done, from the same content.
    """

    name: str
    trained: bool
    scored: bool


@dataclass(frozen=True)
class Foreseen:
    """What a run would do.

    Attributes
    ----------
    folder : Path
    task : str
    embed : list of ToEmbed
    train : list of ToTrain
    finetune : bool
        Whether the network of the best head would be trained too, unless that is done.
    """

    folder: Path
    task: str
    embed: list[ToEmbed]
    train: list[ToTrain]
    finetune: bool

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {**asdict(self), "folder": str(self.folder)}

    def table(self) -> str:
        """The same for the terminal."""
        from featpipe.cli.terminal import table

        images = [[f"{one.images:,}", _told(one), one.backbone, one.cache] for one in self.embed]
        rows = [[one.name, _state(one.trained, "train"), _state(one.scored, "score")] for one in self.train]
        then = ["then the network of the best head would be trained too, unless that is done"] if self.finetune else []
        return "\n\n".join(
            [
                table(images, ["images", "to embed", "backbone", "cache"], right=[0, 1]),
                table(rows, ["head", "", ""]),
                *then,
                f"would be written to {self.folder}; nothing was done",
            ]
        )


def _told(one: ToEmbed) -> str:
    if one.unknown is None:
        return "after the precision is chosen"
    return f"{one.unknown:,}" if one.unknown else "none"


def _state(done: bool, verb: str) -> str:
    return "done" if done else f"to {verb}"


def foresee(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    archive: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    *,
    changes: Mapping[str, Any] | None = None,
    out: str | os.PathLike[str] | None = None,
) -> Foreseen:
    """Say what a run would do; parameters and errors as of :func:`featpipe.run`.

    The backbones are loaded, because their weights are part of what a cache is known by.
    """
    asked = read_recipe(recipe, changes, archive)
    folder = folder_named(asked, out)
    with tempfile.TemporaryDirectory() as elsewhere:
        tiles = tiles_of(asked)
        line = Line.of(asked, folder, quiet, tiles if tiles.is_dir() else Path(elsewhere))
        seen = [_embedding(line, extraction) for extraction in line.recipe.extractions]
        done = {}
        if (folder / "records").is_dir():
            done = {one.trial.slug: one.is_done() for one in attempts(line, [caches for _, caches in seen])}
    train = [ToTrain(trial.slug, *done.get(trial.slug, (False, False))) for trial in trials_of(line.recipe)]
    return Foreseen(folder, line.task, [told for told, _ in seen], train, line.recipe.finetune is not None)


def _embedding(line: Line, settings: Extraction) -> tuple[ToEmbed, Caches | None]:
    """What is known of the images of a backbone; and its caches, if they are what would be made."""
    resolve_devices(settings.device)
    backbone, label = load_backbone(settings), label_of(settings)
    path = cache_path(line.index, backbone, settings, line.recipe.samples.images)
    images = len(line.index) + (0 if line.scored is None else len(line.scored))
    if settings.precision == AUTO:
        return ToEmbed(label, str(path), images, None), None
    unknown, cache = _known(line.index, backbone, settings, path)
    scored = None
    if line.scored is not None:
        others, scored = _known(line.scored, backbone, settings, cache_path(line.scored, backbone, settings, None))
        unknown += others
    whole = cache is not None and (line.scored is None or scored is not None)
    caches = Caches(label, backbone, cache, scored) if whole and cache is not None else None
    return ToEmbed(label, str(path), images, unknown), caches


def _known(index: Index, backbone: Backbone, settings: Extraction, path: Path) -> tuple[int, FeatureCache | None]:
    """How many images no cache and no part knows by their stamps; and the cache, if it is the one of this index."""
    facts, shapes = facts_of(backbone, settings), dict(backbone.shapes)
    ledger = Ledger(index, settings.check_content)
    for cache in caches_for(path.parent, facts):
        ledger.known.add(Source.of_cache(cache, shapes))
    for part in Parts(parts_directory(path), fingerprint(facts)).committed():
        ledger.known.add(source_of_part(part))
    ledger.resolve()
    existing = existing_at(path, facts, index, settings)
    is_whole = existing is not None and is_cache_of(existing, ledger.table(), shapes)
    return len(ledger.unread), existing if is_whole else None
