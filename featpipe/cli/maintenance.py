"""Commands that look after caches: pack, merge, clean."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from featpipe.cli.logging import log_message
from featpipe.cli.options import SHARD_BYTES_OPTION, add_options
from featpipe.cli.terminal import Terminal, format_duration, format_size, print_json, printable
from featpipe.errors import ConfigError

if TYPE_CHECKING:
    from featpipe.cache import FeatureCache
    from featpipe.maintenance import AbandonedFiles

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
    from featpipe.maintenance import pack as run

    with Terminal() as terminal:
        packed_cache = run(cache, out, overwrite=overwrite, progress=terminal)
    _print_cache(packed_cache, as_json)


@click.command(short_help="Join caches that were made from the same facts.")
@click.argument("caches", nargs=-1, required=True, metavar="CACHE...")
@click.option("--out", required=True, metavar="FILE.h5", help="The new file.")
@click.option("--overwrite", is_flag=True, help="Replace another cache at --out.")
@add_options(SHARD_BYTES_OPTION)
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON.")
def merge(caches: tuple[str, ...], out: str, overwrite: bool, shard_bytes: int, as_json: bool) -> None:
    """Join caches that were made from the same facts, one after the other.

    A sample of the same id, bytes and label in several of them is one row; an id that names another image gets #2.
    Classes are united; labels must be of one kind. Each row is verified before it is copied. Prints the path.

    \b
    Example:
      featpipe merge cache/2023.h5 cache/2024.h5 --out cache/both.h5
    """
    from featpipe.maintenance import merge as run

    with Terminal() as terminal:
        merged_cache = run(caches, out, overwrite=overwrite, shard_bytes=shard_bytes, progress=terminal)
    _print_cache(merged_cache, as_json)


def _print_cache(cache: FeatureCache, as_json: bool) -> None:
    if as_json:
        files = [str(file) for file in cache.shard_files]
        counts = {"samples": len(cache), "bad": cache.bad_rows(), "bytes": cache.file_bytes, "shards": files}
        print_json({"cache": str(cache.path), **counts, "merged_from": cache.manifest.get("merged_from")})
    else:
        click.echo(cache.path)


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
    from featpipe.maintenance import clean as find_abandoned
    from featpipe.maintenance import remove_abandoned

    if yes and dry_run:
        raise click.UsageError("--yes removes and --dry-run does not; give one of them")
    abandoned = find_abandoned(folder)
    if not as_json:
        click.echo("\n".join(map(_format_abandoned, abandoned)) or f"{printable(folder)}: nothing is abandoned here")
    should_remove = yes or (bool(abandoned) and not dry_run and not as_json and _confirm_removal(abandoned))
    removed = remove_abandoned(abandoned) if should_remove else []
    if as_json:
        print_json({"folder": folder, "found": [_abandoned_to_dict(item, item in removed) for item in abandoned]})
        return
    for item in abandoned if should_remove else ():
        if item not in removed:
            log_message(f"not removed, in use again or not permitted: {printable(str(item.path))}")
    if removed:
        log_message(f"removed {format_size(sum(item.nbytes for item in removed))}")


def _confirm_removal(abandoned: list[AbandonedFiles]) -> bool:
    total = format_size(sum(item.nbytes for item in abandoned))
    try:
        return click.confirm(f"Remove {'all of this' if len(abandoned) > 1 else 'this'}, {total}?", err=True)
    except click.Abort:
        click.echo(err=True)
        raise ConfigError("nothing was removed, and nobody is there to ask; pass --yes to remove it") from None


def _format_abandoned(item: AbandonedFiles) -> str:
    n_files = len(item.files)
    work, command = ("extraction", "extract") if item.path.name.endswith(".h5.parts") else ("prediction", "predict")
    command = "finetune" if item.path.name.startswith("boundary-") else command
    description = {
        "parts": f"an unfinished {work} of {item.rows:,} images" if item.rows else "work without any result",
        "maps": f"feature maps of {item.rows:,} images, for fine-tuning",
        "shards": f"{n_files:,} {'shard' if n_files == 1 else 'shards'} that no cache in this folder names",
        "temporary": "a temporary file of a process that has ended",
        "lock": "a lock that nobody holds",
    }[item.kind]
    advice = {
        "parts": f"the same {command} command would go on from it" if item.rows else "",
        "maps": "featpipe info shows of what; the next finetune command that needs them would compute them again",
        "shards": "if their cache was moved without them, it needs them",
    }.get(item.kind, "")
    earlier_note = "; what an earlier one made is there" if item.renews else ""
    text = f"{description}, {format_size(item.nbytes)}, {format_duration(item.seconds)} old{earlier_note}" + (
        f"; {advice}" if advice else ""
    )
    return f"{printable(str(item.path))}\n  {text}"


def _abandoned_to_dict(item: AbandonedFiles, removed: bool) -> dict[str, Any]:
    return {
        "kind": item.kind,
        "path": str(item.path),
        "files": [str(file) for file in item.files],
        "bytes": item.nbytes,
        "age_seconds": round(item.seconds, 1),
        "images": item.rows,
        "renews": item.renews,
        "removed": removed,
    }
