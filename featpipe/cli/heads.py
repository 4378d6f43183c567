"""``featpipe heads``."""

from __future__ import annotations

import click

from featpipe.cli.options import JSON_OPTION, add_options
from featpipe.cli.terminal import print_json
from featpipe.config import TASKS
from featpipe.runtime import format_table


@click.command()
@click.argument("name", required=False)
@add_options(JSON_OPTION)
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
    heads_by_task = {task: heads_package.list_heads(task) for task in TASKS}
    rows = [
        {"head": head, "tasks": [task for task in TASKS if head in heads_by_task[task]], "what": spec.summary}
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
        summary = {"head": name, "tasks": list(spec.estimators), "what": spec.summary}
        print_json({**summary, "settings": settings, "grid": grid})
        return
    click.echo(f"{name}: {spec.summary}; for {', '.join(spec.estimators)}\n")
    rows = [
        [key, _format_setting(value), ", ".join(map(_format_setting, grid.get(key, [])))]
        for key, value in settings.items()
    ]
    click.echo(format_table(rows, ["setting", "default", "tried by --tune"]))


def _format_setting(value: object) -> str:
    """Format a value as ``--set`` takes it."""
    if callable(value):
        return getattr(value, "__name__", repr(value))
    if isinstance(value, tuple):
        return ",".join(map(str, value)) + ("," if len(value) == 1 else "")
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
