"""``featpipe run``."""

from __future__ import annotations

import click

from featpipe.cli.completion import NameParameter
from featpipe.cli.logging import log_message
from featpipe.cli.options import JSON_OPTION, OVERWRITE_OPTION, add_options
from featpipe.cli.terminal import Terminal, print_json
from featpipe.runtime import format_table


def _list_recipes() -> list[tuple[str, str]]:
    from featpipe.experiments import list_builtin_recipes, read_question

    return [(name, read_question(name)) for name in list_builtin_recipes()]


def _print_recipes(as_json: bool) -> None:
    if as_json:
        print_json([{"recipe": name, "question": question} for name, question in _list_recipes()])
    else:
        click.echo(format_table(_list_recipes(), ["recipe", "question"]))


@click.command()
@click.argument(
    "recipe", metavar="RECIPE", required=False, type=NameParameter("recipe", _list_recipes, allow_files=True)
)
@click.argument("archives", nargs=-1, metavar="[ARCHIVE]...", type=click.Path())
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a value of the recipe, such as heads.0.C=10, or a list: heads.0.C=1,10.",
)
@click.option("--out", metavar="DIR", type=click.Path(), help="Folder of the run.  [default: runs/RECIPE]")
@click.option("--dry-run", is_flag=True, help="Show which stages are done and which would run; run nothing.")
@click.option("--list", "list_recipes", is_flag=True, help="List the built-in recipes.")
@add_options(OVERWRITE_OPTION, JSON_OPTION)
def run(
    recipe: str | None,
    archives: tuple[str, ...],
    settings: tuple[str, ...],
    out: str | None,
    dry_run: bool,
    list_recipes: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Run a recipe: from images to trained models and a report.

    RECIPE is a TOML file or the name of a built-in recipe (--list). Finished stages are reused, also after an
    interrupted run. Prints a table of the trials; the folder of the run holds models, results, the report, and the
    recipe with all defaults filled in.

    \b
    Example:
      featpipe run smoke
      featpipe run linear-probe photos/ --set heads.0.C=0.1,1,10 --out runs/photos
    """
    if list_recipes:
        _print_recipes(as_json)
        return
    if recipe is None:
        raise click.UsageError("Missing argument 'RECIPE'; --list shows the built-in ones.")
    from featpipe.experiments import parse_changes, plan_run
    from featpipe.experiments import run as run_recipe

    changes = parse_changes(settings)
    if dry_run:
        plan = plan_run(recipe, archives or None, changes=changes, out=out)
        print_json(plan.to_dict()) if as_json else click.echo(plan.table())
        return
    with Terminal() as terminal:
        result = run_recipe(recipe, archives or None, changes=changes, out=out, overwrite=overwrite, progress=terminal)
    if as_json:
        print_json(result.to_dict())
        return
    click.echo(result.table())
    log_message(f"\n{result.report}\n{result.best.model}")
