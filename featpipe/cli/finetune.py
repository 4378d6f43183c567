"""``featpipe finetune``."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featpipe.cli.logging import log_message
from featpipe.cli.options import (
    JSON_OPTION,
    MODEL_OPTIONS,
    OVERWRITE_OPTION,
    RESUME_OPTION,
    add_options,
    setting,
    settings_option,
)
from featpipe.cli.outputs import claim_outputs
from featpipe.cli.terminal import Terminal, print_json
from featpipe.config import FineTuneConfig
from featpipe.runtime import format_table

if TYPE_CHECKING:
    from featpipe.finetuning import FineTuningResult

MAX_LISTED_CLASSES = 20


def _parse_learning_rate(context: click.Context, option: click.Parameter, text: str) -> float | str:
    try:
        return text if text == "find" else float(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a number; an example is 3e-4, or find") from None


_setting = partial(setting, FineTuneConfig)


@click.command()
@click.argument("model", metavar="MODEL")
@click.argument("archives", nargs=-1, required=True, metavar="ARCHIVE...")
@add_options(
    _setting(
        "unfreeze",
        'Part to train: head, last, "3 stages", 0.3 (a share), all, "layers[15:]" or names such as "blocks.6*".  '
        "[default: last]",
        default=None,
        metavar="WHAT",
    ),
    _setting("weights", "none trains the architecture from scratch."),
    _setting(
        "gradual", "Unfreeze one more stage every N epochs.  [default: 0, all from the start]", type=int, metavar="N"
    ),
    _setting("epochs", "Maximum number of epochs.", type=int, metavar="N"),
    _setting("batch", "Images per training step.", type=int, metavar="N"),
    _setting(
        "learning_rate",
        "Learning rate of the new layer; find searches for one.",
        type=str,
        callback=_parse_learning_rate,
        metavar="R",
    ),
    _setting("patience", "Epochs without improvement before stopping; 0 trains all epochs.", type=int, metavar="N"),
    _setting("precision", "Precision of training."),
    _setting("cache_activations", "Cache the feature maps of the frozen layers."),
    settings_option("--augment", "augmentation", "Augmentation of images, such as flip=0.5."),
    settings_option("--set", "settings", "Other settings: layer_decay, ema, mixup, schedule, …"),
    *MODEL_OPTIONS,
    _setting("seed", "Random seed.", metavar="N"),
    RESUME_OPTION,
    _setting("keep_worse", "Save the fine-tuned model even if the old model scores better."),
)
@click.option("--tensorboard", metavar="DIR", help="Write losses and scores per epoch to this folder.")
@click.option("--out", metavar="MODEL", help="File of the new model.  [default: MODEL with the suffix .tuned.model]")
@add_options(OVERWRITE_OPTION, JSON_OPTION)
def finetune(
    model: str,
    archives: tuple[str, ...],
    overwrite: bool,
    backbone: str | None,
    settings: dict[str, Any],
    out: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Fine-tune part of a model's backbone.

    The new layer is initialized from the model's head, so that training starts from the model's own predictions. The
    fine-tuned model and the old one are compared on held-out images; the old one is kept if it scores better. Prints
    the path of the new model.

    \b
    Example:
      featpipe finetune photos.model photos/ --unfreeze "2 stages" --epochs 20
    """
    from featpipe.finetuning import finetune as run
    from featpipe.model import load_model

    claim = claim_outputs(model, *archives, options["labels"], overwrite=overwrite)
    out = str(claim.add(out or _make_output_path(Path(model))))
    loaded_model = load_model(model, backbone=backbone, device=options["device"])
    options = {name: value for name, value in options.items() if value is not None}
    if repeated := sorted(options.keys() & settings.keys()):
        flag = "augment" if repeated[0] == "augmentation" else repeated[0].replace("_", "-")
        raise click.UsageError(f"--set {repeated[0]}: use the option --{flag}")
    with Terminal() as terminal:
        finetuned = run(loaded_model, list(archives), out=out, progress=terminal, **options, **settings)
    if int(os.environ.get("RANK", "0")):  # of the processes that torchrun started, the first one prints
        return
    claim.record()
    if as_json:
        verdict = finetuned.comparison.verdict()
        print_json({"model": str(finetuned.model.path), "verdict": verdict, **finetuned.to_dict()})
        return
    _print_finetuned(finetuned)
    click.echo(finetuned.model.path)


def _make_output_path(model_path: Path) -> Path:
    """Path beside the old model."""
    return model_path.with_name(f"{model_path.name.removesuffix('.model')}.tuned.model")


def _print_finetuned(finetuned: FineTuningResult) -> None:
    """Print the scores of both models, the classes and the verdict."""
    score_rows, class_rows = finetuned.as_table(), finetuned.class_table()
    log_message("\n" + format_table(score_rows[1:], score_rows[0], right_aligned=range(1, 5)), event="table")
    if len(class_rows) > 1:
        listed_rows = class_rows[1 : 1 + MAX_LISTED_CLASSES]
        log_message("\n" + format_table(listed_rows, class_rows[0], right_aligned=range(1, 5)), event="table")
        if len(class_rows) > 1 + MAX_LISTED_CLASSES:
            log_message(f"the first {MAX_LISTED_CLASSES} of {len(class_rows) - 1} classes; --json lists all")
    kept_note = (
        "" if finetuned.kept == "fine-tuned" else "; the old model is kept (--keep-worse saves the fine-tuned one)"
    )
    log_message(f"\n{finetuned.comparison.verdict()}{kept_note}")
