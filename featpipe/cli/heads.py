"""``featpipe heads``."""

from __future__ import annotations

import click

from featpipe.cli.terminal import print_json
from featpipe.config import TASKS
from featpipe.runtime import format_table


@click.command(short_help="List the available heads.")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def heads(name: str | None, as_json: bool) -> None:
    """List the available heads and their tasks; with NAME, the settings of a head and their defaults.

    \b
    Example:
      featpipe heads
      featpipe heads mlp
    """
    from featpipe import heads as heads_package

    if name is not None:
        _print_head_settings(name, as_json)
        return
    rows = [
        {
            "head": head,
            "tasks": [task for task in TASKS if head in heads_package.list_heads(task)],
            "what": spec.summary,
        }
        for head, spec in heads_package.HEAD_REGISTRY.items()
    ]
    if as_json:
        print_json(rows)
        return
    click.echo(format_table([[row["head"], ", ".join(row["tasks"]), row["what"]] for row in rows], ["head", "for", ""]))
    click.echo(
        "\nAny other scikit-learn estimator can be used by its import path, such as sklearn.naive_bayes.GaussianNB"
    )


def _print_head_settings(name: str, as_json: bool) -> None:
    from featpipe import heads as heads_package

    spec = heads_package.get_spec(name)
    settings = heads_package.get_settings(name)
    grid = {key: list(values) for key, values in spec.grid.items()}
    if as_json:
        details = {
            "head": name,
            "tasks": list(spec.estimators),
            "what": spec.summary,
            "settings": settings,
            "grid": grid,
        }
        print_json(details)
        return
    click.echo(f"{name}: {spec.summary}; for {', '.join(spec.estimators)}\n")
    rows = [
        [key, _format_setting(value), ", ".join(map(_format_setting, grid.get(key, [])))]
        for key, value in settings.items()
    ]
    click.echo(format_table(rows, ["setting", "default", "tried by --tune"]))


def _format_setting(value: object) -> str:
    """As ``--set`` takes it."""
    if callable(value):
        return getattr(value, "__name__", repr(value))
    if isinstance(value, tuple):
        return ",".join(map(str, value)) + ("," if len(value) == 1 else "")
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
