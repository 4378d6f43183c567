"""Commands that look after caches: pack, merge, clean."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from featpipe.cli.log import say
from featpipe.cli.request import SHARD_BYTES, options
from featpipe.cli.terminal import Terminal, dump, duration, printable, size
from featpipe.errors import ConfigError

if TYPE_CHECKING:
    from featpipe.cache import FeatureCache
    from featpipe.upkeep import Abandoned

__all__ = ["clean", "merge", "pack"]


@click.command(short_help="Make one portable file of a cache that is spread over shards.")
@click.argument("cache", metavar="CACHE")
@click.option("--out", metavar="FILE.h5", help="The new file.  [default: CACHE itself becomes one file]")
@click.option("--overwrite", is_flag=True, help="Replace another cache at --out.")
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON.")
def pack(cache: str, out: str | None, overwrite: bool, as_json: bool) -> None:
    """Make one portable file of a cache that is spread over shards.

    Its rows are those of CACHE, byte for byte; each is verified before it is copied. Prints the path.

    \b
    Example:
      featpipe pack cache/photos.h5 --out photos-portable.h5
    """
    from featpipe.upkeep import pack as run

    with Terminal() as terminal:
        made = run(cache, out, overwrite=overwrite, progress=terminal)
    _print(made, as_json)


@click.command(short_help="Join caches that were made from the same facts.")
@click.argument("caches", nargs=-1, required=True, metavar="CACHE...")
@click.option("--out", required=True, metavar="FILE.h5", help="The new file.")
@click.option("--overwrite", is_flag=True, help="Replace another cache at --out.")
@options(SHARD_BYTES)
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON.")
def merge(caches: tuple[str, ...], out: str, overwrite: bool, shard_bytes: int, as_json: bool) -> None:
    """Join caches that were made from the same facts, one after the other.

    A sample of the same id, bytes and label in several of them is one row; an id that names another image gets #2.
    Classes are united; labels must be of one kind. Each row is verified before it is copied. Prints the path.

    \b
    Example:
      featpipe merge cache/2023.h5 cache/2024.h5 --out cache/both.h5
    """
    from featpipe.upkeep import merge as run

    with Terminal() as terminal:
        made = run(caches, out, overwrite=overwrite, shard_bytes=shard_bytes, progress=terminal)
    _print(made, as_json)


def _print(made: FeatureCache, as_json: bool) -> None:
    if as_json:
        files = [str(file) for file in made.shard_files]
        counts = {"samples": len(made), "bad": made.bad_rows(), "bytes": made.file_bytes, "shards": files}
        dump({"cache": str(made.path), **counts, "merged_from": made.manifest.get("merged_from")})
    else:
        click.echo(made.path)


@click.command(short_help="Remove work that was begun and that nobody goes on with.")
@click.argument("folder", default="cache", metavar="[DIR]")
@click.option("--yes", is_flag=True, help="Remove without asking.")
@click.option("--dry-run", is_flag=True, help="Only show.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON; nothing is asked, nor removed without --yes.")
def clean(folder: str, yes: bool, dry_run: bool, as_json: bool) -> None:
    """Remove work that was begun and that nobody goes on with, from DIR, by default `cache`.

    Shows unfinished extractions and predictions, feature maps that fine-tuning kept and has not used for an hour,
    shards that no cache names, temporary files and locks of processes that have ended, and asks. What a process is
    using, caches of embeddings, and files that are not featpipe's, are left alone.

    \b
    Example:
      featpipe clean cache --dry-run
    """
    from featpipe.upkeep import clean as look
    from featpipe.upkeep import remove

    if yes and dry_run:
        raise click.UsageError("--yes removes and --dry-run does not; give one of them")
    found = look(folder)
    if not as_json:
        click.echo("\n".join(map(_told, found)) or f"{printable(folder)}: nothing is abandoned here")
    wanted = yes or (bool(found) and not dry_run and not as_json and _agreed(found))
    removed = remove(found) if wanted else []
    if as_json:
        dump({"folder": folder, "found": [_json(thing, thing in removed) for thing in found]})
        return
    for thing in found if wanted else ():
        if thing not in removed:
            say(f"not removed, in use again or not permitted: {printable(str(thing.path))}")
    if removed:
        say(f"removed {size(sum(thing.nbytes for thing in removed))}")


def _agreed(found: list[Abandoned]) -> bool:
    total = size(sum(thing.nbytes for thing in found))
    try:
        return click.confirm(f"Remove {'all of this' if len(found) > 1 else 'this'}, {total}?", err=True)
    except click.Abort:
        click.echo(err=True)
        raise ConfigError("nothing was removed, and nobody is there to ask; pass --yes to remove it") from None


def _told(thing: Abandoned) -> str:
    number = len(thing.files)
    work, command = ("extraction", "extract") if thing.path.name.endswith(".h5.parts") else ("prediction", "predict")
    command = "finetune" if thing.path.name.startswith("boundary-") else command
    what = {
        "parts": f"an unfinished {work} of {thing.rows:,} images" if thing.rows else "work without any result",
        "maps": f"feature maps of {thing.rows:,} images, for fine-tuning",
        "shards": f"{number:,} {'shard' if number == 1 else 'shards'} that no cache in this folder names",
        "temporary": "a temporary file of a process that has ended",
        "lock": "a lock that nobody holds",
    }[thing.kind]
    advice = {
        "parts": f"the same {command} command would go on from it" if thing.rows else "",
        "maps": "featpipe info shows of what; the next finetune command that needs them would compute them again",
        "shards": "if their cache was moved without them, it needs them",
    }.get(thing.kind, "")
    earlier = "; what an earlier one made is there" if thing.renews else ""
    text = f"{what}, {size(thing.nbytes)}, {duration(thing.seconds)} old{earlier}" + (f"; {advice}" if advice else "")
    return f"{printable(str(thing.path))}\n  {text}"


def _json(thing: Abandoned, removed: bool) -> dict[str, Any]:
    return {
        "kind": thing.kind,
        "path": str(thing.path),
        "files": [str(file) for file in thing.files],
        "bytes": thing.nbytes,
        "age_seconds": round(thing.seconds, 1),
        "images": thing.rows,
        "renews": thing.renews,
        "removed": removed,
    }
