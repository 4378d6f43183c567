"""``featpipe finetune``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featpipe.cli.logging import log_message
from featpipe.cli.options import (
    CACHE_OPTION,
    DEVICE_OPTION,
    LABELS_OPTION,
    MODEL_BACKBONE_OPTION,
    add_options,
    make_option_type,
)
from featpipe.cli.terminal import Terminal, print_json
from featpipe.config import FineTuneConfig
from featpipe.runtime import format_table

if TYPE_CHECKING:
    from featpipe.finetuning import FineTuningResult

FINETUNE_DEFAULTS = FineTuneConfig()
MAX_LISTED_CLASSES = 20  # classes


def _parse_learning_rate(context: click.Context, option: click.Parameter, text: str) -> float | str:
    try:
        return text if text == "find" else float(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a number; an example is 3e-4, or find") from None


@click.command(short_help="Fine-tune part of a model's backbone.")
@click.argument("model", metavar="MODEL")
@click.argument("archives", nargs=-1, required=True, metavar="ARCHIVE...")
@click.option(
    "--unfreeze",
    metavar="WHAT",
    help='Part to train: head, last, "3 stages", 0.3 (a share), all, "layers[15:]" or names such as "blocks.6*".  '
    "[default: last]",
)
@click.option(
    "--weights", type=make_option_type(FineTuneConfig, "weights"), help="Train the architecture from scratch."
)
@click.option(
    "--gradual",
    type=int,
    default=FINETUNE_DEFAULTS.gradual,
    metavar="N",
    help="Unfreeze one more stage every N epochs.",
)
@click.option(
    "--epochs",
    type=int,
    default=FINETUNE_DEFAULTS.epochs,
    show_default=True,
    metavar="N",
    help="Maximum number of epochs.",
)
@click.option(
    "--batch",
    type=int,
    default=FINETUNE_DEFAULTS.batch,
    show_default=True,
    metavar="N",
    help="Images per training step.",
)
@click.option(
    "--learning-rate",
    default=str(FINETUNE_DEFAULTS.learning_rate),
    show_default=True,
    callback=_parse_learning_rate,
    metavar="R",
    help="Learning rate of the new layer; find searches for one.",
)
@click.option(
    "--patience",
    type=int,
    default=FINETUNE_DEFAULTS.patience,
    show_default=True,
    metavar="N",
    help="Epochs without improvement before stopping; 0 trains all epochs.",
)
@click.option(
    "--precision",
    type=make_option_type(FineTuneConfig, "precision"),
    default=FINETUNE_DEFAULTS.precision,
    show_default=True,
    help="Precision of training.",
)
@click.option(
    "--cache-activations",
    type=make_option_type(FineTuneConfig, "cache_activations"),
    default=FINETUNE_DEFAULTS.cache_activations,
    show_default=True,
    help="Cache the feature maps of the frozen layers.",
)
@click.option(
    "--augment",
    "augmentation",
    multiple=True,
    metavar="KEY=VALUE",
    help="Augmentation of images: flip=0.5, crop=0.5, …",
)
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Other settings: layer_decay, ema, mixup, schedule, …"
)
@add_options(LABELS_OPTION, CACHE_OPTION, MODEL_BACKBONE_OPTION, DEVICE_OPTION)
@click.option("--seed", type=int, default=FINETUNE_DEFAULTS.seed, show_default=True, help="Random seed.")
@click.option(
    "--resume/--restart", default=True, show_default=True, help="Resume from the checkpoint beside --out, or restart."
)
@click.option("--keep-worse", is_flag=True, help="Save the fine-tuned model even if the old model scores better.")
@click.option("--tensorboard", metavar="DIR", help="Write losses and scores per epoch to this folder.")
@click.option("--out", metavar="MODEL", help="File of the new model.  [default: MODEL with the suffix .tuned.model]")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def finetune(model: str, archives: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Fine-tune part of a model's backbone.

    The new layer is initialized from the model's head, so that training starts from the model's own predictions. The
    fine-tuned model and the old one are compared on held-out images; the old one is kept if it scores better. Prints
    the path of the new model.

    \b
    Example:
      featpipe finetune photos.model photos/ --unfreeze "2 stages" --epochs 20
    """
    from featpipe.config import parse_settings
    from featpipe.finetuning import finetune as run
    from featpipe.model import load_model

    loaded_model = load_model(model, backbone=options.pop("backbone"), device=options["device"])
    out = options.pop("out") or _make_output_path(Path(model))
    extra_settings: dict[str, Any] = {
        **parse_settings(options.pop("settings")),
        "augmentation": parse_settings(options.pop("augmentation")),
    }
    given_options = {name: value for name, value in options.items() if value is not None}
    if repeated := sorted(given_options.keys() & extra_settings.keys()):
        raise click.UsageError(f"--set {repeated[0]}: use the option --{repeated[0].replace('_', '-')}")
    with Terminal() as terminal:
        finetuned = run(loaded_model, list(archives), out=out, progress=terminal, **given_options, **extra_settings)
    if int(os.environ.get("RANK", "0")):  # of the processes that torchrun started, the first one prints
        return
    if as_json:
        print_json({"model": str(finetuned.model.path), **finetuned.to_dict()})
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
        log_message(
            "\n" + format_table(class_rows[1 : 1 + MAX_LISTED_CLASSES], class_rows[0], right_aligned=range(1, 5)),
            event="table",
        )
        if len(class_rows) > 1 + MAX_LISTED_CLASSES:
            log_message(f"the first {MAX_LISTED_CLASSES} of {len(class_rows) - 1} classes; --json has all")
    kept_note = (
        "" if finetuned.kept == "fine-tuned" else "; the old model is kept (--keep-worse saves the fine-tuned one)"
    )
    log_message(f"\n{finetuned.comparison.verdict()}{kept_note}")
