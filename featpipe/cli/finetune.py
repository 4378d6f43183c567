"""``featpipe finetune``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featpipe.cli.logging import log_message
from featpipe.cli.terminal import Terminal, print_json
from featpipe.config import AUTO, FineTuneConfig
from featpipe.runtime import format_table

if TYPE_CHECKING:
    from featpipe.finetuning import FineTuningResult

__all__ = ["finetune"]

FINETUNE_DEFAULTS = FineTuneConfig()
MAX_LISTED_CLASSES = 20  # classes


def _parse_learning_rate(context: click.Context, option: click.Parameter, text: str) -> float | str:
    try:
        return text if text == "find" else float(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is no number; write it as in 3e-4, or find") from None


@click.command(short_help="Train some of a model's network too; prints the path of the new model.")
@click.argument("model", metavar="MODEL")
@click.argument("archives", nargs=-1, required=True, metavar="ARCHIVE...")
@click.option(
    "--unfreeze",
    metavar="WHAT",
    help='head, last, "3 stages", 0.3 of them, all, "layers[15:]", names such as "blocks.6*".  [default: last]',
)
@click.option("--weights", type=click.Choice(["none"]), help="Start from the untrained architecture instead.")
@click.option(
    "--gradual", type=int, default=FINETUNE_DEFAULTS.gradual, metavar="N", help="One more stage every N epochs."
)
@click.option("--epochs", type=int, default=FINETUNE_DEFAULTS.epochs, show_default=True, metavar="N", help="At most.")
@click.option(
    "--batch", type=int, default=FINETUNE_DEFAULTS.batch, show_default=True, metavar="N", help="Images in a step."
)
@click.option(
    "--learning-rate",
    default=str(FINETUNE_DEFAULTS.learning_rate),
    show_default=True,
    callback=_parse_learning_rate,
    metavar="R",
    help="Of the new layer; find looks for one.",
)
@click.option(
    "--patience", type=int, default=FINETUNE_DEFAULTS.patience, show_default=True, metavar="N", help="0: all epochs."
)
@click.option(
    "--precision", type=click.Choice(["fp32", "bf16", "fp16"]), default=FINETUNE_DEFAULTS.precision, show_default=True
)
@click.option(
    "--cache-activations",
    type=click.Choice([AUTO, "yes", "no"]),
    default=FINETUNE_DEFAULTS.cache_activations,
    show_default=True,
)
@click.option(
    "--augment", "augmentation", multiple=True, metavar="KEY=VALUE", help="Change pictures: flip=0.5, crop=0.5 …"
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="layer_decay, ema, mixup, schedule, … .")
@click.option("--labels", metavar="TABLE", help="A CSV or Parquet table of paths and labels; a column split counts.")
@click.option("--cache", default="cache", show_default=True, metavar="DIR", help="Where caches are kept.")
@click.option("--backbone", metavar="NAME", help="Needed for a model that was trained on code of your own.")
@click.option(
    "--device", default=FINETUNE_DEFAULTS.device, show_default=True, metavar="D", help="auto, cpu, cuda, cuda:N, mps."
)
@click.option(
    "--seed", type=int, default=FINETUNE_DEFAULTS.seed, show_default=True, help="For the order of the images."
)
@click.option("--resume/--restart", default=True, show_default=True, help="Go on from the checkpoint beside --out.")
@click.option("--keep-worse", is_flag=True, help="Save the fine-tuned model even if the probe is better.")
@click.option("--tensorboard", metavar="DIR", help="Write losses and scores by epoch there.")
@click.option("--out", metavar="MODEL", help="The new model's file.  [default: MODEL's name with .tuned.model]")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def finetune(model: str, archives: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Train some of a model's network too; prints the path of the new model.

    The new layer starts as the model's head, so that the first answers are the model's own. Some images are held out;
    on these the fine-tuned model and the old one are compared at the end, and the old one is kept if it is better.

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
        raise click.UsageError(f"--set {repeated[0]}: there is an option for it, --{repeated[0].replace('_', '-')}")
    with Terminal() as terminal:
        finetuned = run(loaded_model, list(archives), out=out, progress=terminal, **given_options, **extra_settings)
    if int(os.environ.get("RANK", "0")):  # of several processes that torchrun started, one speaks
        return
    if as_json:
        print_json({"model": str(finetuned.model.path), **finetuned.to_dict()})
        return
    _print_finetuned(finetuned)
    click.echo(finetuned.model.path)


def _make_output_path(model_path: Path) -> Path:
    """Beside the model before."""
    return model_path.with_name(f"{model_path.name.removesuffix('.model')}.tuned.model")


def _print_finetuned(finetuned: FineTuningResult) -> None:
    """Scores of both models, the classes, and the verdict."""
    score_rows, class_rows = finetuned.as_table(), finetuned.class_table()
    log_message("\n" + format_table(score_rows[1:], score_rows[0], right_aligned=range(1, 5)), event="table")
    if len(class_rows) > 1:
        log_message(
            "\n" + format_table(class_rows[1 : 1 + MAX_LISTED_CLASSES], class_rows[0], right_aligned=range(1, 5)),
            event="table",
        )
        if len(class_rows) > 1 + MAX_LISTED_CLASSES:
            log_message(f"the first {MAX_LISTED_CLASSES} of {len(class_rows) - 1} classes; --json has all")
    kept_note = "" if finetuned.kept == "fine-tuned" else "; the model before is kept (--keep-worse saves the other)"
    log_message(f"\n{finetuned.comparison.verdict()}{kept_note}")
