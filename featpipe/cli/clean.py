"""``featpipe clean``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from featpipe.cli.logging import log_message
from featpipe.cli.terminal import print_json
from featpipe.errors import ConfigError
from featpipe.runtime import format_duration, format_size, printable

if TYPE_CHECKING:
    from featpipe.maintenance import AbandonedFiles


@click.command()
@click.argument("folder", default="cache", metavar="[DIR]")
@click.option("--yes", is_flag=True, help="Remove without asking.")
@click.option("--dry-run", is_flag=True, help="Show what would be removed; remove nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON without asking; removes only with --yes.")
def clean(folder: str, yes: bool, dry_run: bool, as_json: bool) -> None:
    """Remove unfinished work that no process uses from DIR, by default `cache`.

    Lists unfinished extractions and predictions, feature maps of fine-tuning that were not used for an hour, shards
    that belong to no cache, and temporary files and locks of processes that have ended; then asks. Files in use, caches
    of embeddings and files of other programs are never removed.

    \b
    Example:
      featpipe clean cache --dry-run
    """
    from featpipe.maintenance import clean as find_abandoned
    from featpipe.maintenance import remove_abandoned

    if yes and dry_run:
        raise click.UsageError("--yes and --dry-run exclude each other; give one of them")
    abandoned = find_abandoned(folder)
    if not as_json:
        click.echo("\n".join(map(_format_abandoned, abandoned)) or f"{printable(folder)}: nothing to remove")
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
        raise ConfigError("nothing was removed: no answer could be read; pass --yes to remove without asking") from None


def _format_abandoned(item: AbandonedFiles) -> str:
    n_files = len(item.files)
    work, command = ("extraction", "extract") if item.path.name.endswith(".h5.parts") else ("prediction", "predict")
    command = "finetune" if item.path.name.startswith("boundary-") else command
    description = {
        "parts": f"an unfinished {work} of {item.rows:,} images" if item.rows else "unfinished work without results",
        "maps": f"feature maps of {item.rows:,} images, for fine-tuning",
        "shards": f"{n_files:,} {'shard' if n_files == 1 else 'shards'} that belong to no cache in this folder",
        "temporary": "a temporary file of a process that has ended",
        "lock": "a lock that no process holds",
    }[item.kind]
    advice = {
        "parts": f"the same {command} command would resume from it" if item.rows else "",
        "maps": "`featpipe info` shows their source; a finetune command that needs them computes them again",
        "shards": "needed if their cache was moved without them",
    }.get(item.kind, "")
    earlier_note = "; the result of an earlier run exists" if item.renews else ""
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
