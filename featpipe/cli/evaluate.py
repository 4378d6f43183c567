"""``featpipe evaluate``."""

from __future__ import annotations

from typing import Any

import click

from featpipe.cli.logging import log_message
from featpipe.cli.options import (
    FINDINGS_OPTION,
    JSON_OPTION,
    MODEL_OPTIONS,
    OVERWRITE_OPTION,
    WITHOUT_OPTION,
    add_options,
)
from featpipe.cli.outputs import claim_outputs
from featpipe.cli.terminal import Terminal, get_command_line, print_json


@click.command()
@click.argument("model", metavar="MODEL")
@click.argument("data", nargs=-1, required=True, metavar="CACHE|ARCHIVE...")
@click.option("--against", multiple=True, metavar="MODEL", help="Compare with another model on the same rows.")
@add_options(WITHOUT_OPTION)
@click.option(
    "--trained-on",
    metavar="CACHE",
    help="Cache the model was trained on, to find near duplicates.  [default: found in --cache]",
)
@click.option(
    "--near", type=click.FloatRange(0, 1, min_open=True), metavar="COSINE", help="Cosine threshold for near duplicates."
)
@add_options(*MODEL_OPTIONS)
@click.option("--report", metavar="PAGE.html", help="Write an HTML report.")
@add_options(FINDINGS_OPTION, OVERWRITE_OPTION, JSON_OPTION)
def evaluate(
    model: str,
    data: tuple[str, ...],
    against: tuple[str, ...],
    backbone: str | None,
    device: str,
    report: str | None,
    findings: str | None,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Evaluate a model on images it was not trained on.

    Exact copies of training images are excluded and counted; near duplicates are scored and counted.

    \b
    Example:
      featpipe evaluate photos.model new-photos/ --report page.html
      featpipe evaluate photos.model cache/photos.h5 --against other.model
    """
    from featpipe.diagnostics import write_findings
    from featpipe.evaluation import evaluate as run
    from featpipe.model import load_model
    from featpipe.report import write_report

    claim = claim_outputs(
        model, *data, *against, settings["labels"], settings["without"], settings["trained_on"], overwrite=overwrite
    )
    if report:
        claim.add(report, "--report")
    claim.add_findings(findings)
    loaded_model = load_model(model, backbone=backbone, device=device)
    baselines = [load_model(path, backbone=backbone, device=device) for path in against]
    settings = {name: value for name, value in settings.items() if value is not None}
    with Terminal() as terminal:
        evaluation = run(loaded_model, list(data), against=baselines, progress=terminal, **settings)
        if report:
            write_report(report, evaluation, command=get_command_line())
        finding_paths = write_findings(evaluation.findings, findings) if findings else []
    claim.record()
    if as_json:
        print_json(evaluation.to_dict())
        return
    click.echo(evaluation.table())
    for path in [*([report] if report else []), *map(str, finding_paths)]:
        log_message(path)
