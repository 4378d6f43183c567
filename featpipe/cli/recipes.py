"""The command that runs recipes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from featpipe.cli.complete import Name
from featpipe.cli.log import say
from featpipe.cli.terminal import Terminal, dump, table

if TYPE_CHECKING:
    from featpipe.pipeline.foreseen import Foreseen

__all__ = ["run"]


def _known() -> list[tuple[str, str]]:
    from featpipe.recipe import question_of, shipped

    return [(name, question_of(name)) for name in shipped()]


def _listed(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        click.echo(table(_known(), ["recipe", "question"]))
        context.exit()


@click.command(short_help="Run a recipe: from images to trained models and a page.")
@click.argument("recipe", metavar="RECIPE", type=Name("recipe", _known, files=True))
@click.argument("archives", nargs=-1, metavar="[ARCHIVE]...", type=click.Path())
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Another value: heads.0.C=10; lists: 1,10.")
@click.option("--out", metavar="DIR", type=click.Path(), help="The run's folder.  [default: runs/RECIPE]")
@click.option("--dry-run", is_flag=True, help="Say what would be done and what is done already; do nothing.")
@click.option("--list", is_flag=True, is_eager=True, expose_value=False, callback=_listed, help="Name the recipes.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def run(
    recipe: str, archives: tuple[str, ...], settings: tuple[str, ...], out: str | None, dry_run: bool, as_json: bool
) -> None:
    """Run a recipe: from images to trained models and a page.

    RECIPE is a TOML file, or the name of one that comes along (--list). Stages that are done are skipped, also after a
    kill. Prints the table; models, results and the recipe with every default lie in the run's folder.

    \b
    Example:
      featpipe run smoke
      featpipe run linear-probe photos/ --set heads.0.C=0.1,1,10 --out runs/photos
    """
    from featpipe.recipe import parse_changes

    changes = parse_changes(settings)
    with Terminal() as terminal:
        if dry_run:
            _foretold(recipe, archives, changes, out, as_json)
            return
        from featpipe.pipeline import run as run_recipe

        found = run_recipe(recipe, archives or None, changes=changes, out=out, progress=terminal)
    if as_json:
        dump(found.to_dict())
        return
    click.echo(found.table())
    say(f"\n{found.report}\n{found.best.model}")


def _foretold(recipe: str, archives: tuple[str, ...], changes: dict[str, Any], out: str | None, as_json: bool) -> None:
    from featpipe.pipeline.foreseen import foresee

    found: Foreseen = foresee(recipe, archives or None, changes=changes, out=out)
    dump(found.to_dict()) if as_json else click.echo(found.table())
