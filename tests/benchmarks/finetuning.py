"""Does fine-tuning help? The probe and the fine-tuned model on the same held-out images.

    python tests/benchmarks/finetuning.py tiles
    python tests/benchmarks/finetuning.py drawings FOLDER

"tiles" are those of the demo: trained on the left halves of photographs, tested on the right halves. "drawings" are
those of openclipart, in FOLDER (``usr/share/openclipart/png`` of Debian's package openclipart-png): at most 400 of each
of eleven categories, selected by the digest of their paths; a fifth is the test set.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from featpipe import extract, finetune, train
from featpipe.data import write_tiles

CATEGORIES = (
    "animals",
    "buildings",
    "food",
    "geography",
    "office",
    "people",
    "plants",
    "recreation",
    "signs_and_symbols",
    "tools",
    "transportation",
)
MAX_PER_CATEGORY = 400
AUGMENTED = {"augmentation": {"flip": 0.5, "crop": 0.35}, "views": 5, "label_smoothing": 0.1}
RUNS: dict[str, dict[str, Any]] = {
    "last": {"label_smoothing": 0.1, "epochs": 8},
    "2 stages": {"unfreeze": "2", "label_smoothing": 0.1, "epochs": 8},
    "last, augmented": {**AUGMENTED, "epochs": 12, "learning_rate": 1e-4, "ema": 0.98},
    "2 stages, augmented": {**AUGMENTED, "unfreeze": "2", "epochs": 12, "learning_rate": 1e-4, "ema": 0.98},
}


def copy_drawings(source: Path, folder: Path) -> Path:
    """Copy some drawings of each category into a folder for each."""
    for category in CATEGORIES:
        (folder / category).mkdir(parents=True)
        paths = sorted((source / category).rglob("*.png"), key=lambda path: sha256(path.name.encode()).digest())
        small_paths = [path for path in paths if path.stat().st_size < 2_000_000]
        for number, path in enumerate(small_paths[:MAX_PER_CATEGORY]):
            shutil.copyfile(path, folder / category / f"{number:04}.png")
    return folder


def main(arguments: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as folder_name:
        folder, labels = Path(folder_name), None
        if arguments[0] == "tiles":
            archive, labels = write_tiles(folder)
        else:
            archive = copy_drawings(Path(arguments[1]), folder / "drawings")
        cache = folder / "cache"
        model = train(extract(archive, labels=labels, cache=cache), cv=None)
        print("| | probe | fine-tuned | difference | p | log loss | best epoch | seconds |")
        print("|---|---|---|---|---|---|---|---|")
        for name in arguments[2 - (arguments[0] == "tiles") :] or RUNS:
            started = perf_counter()
            result = finetune(model, archive, labels=labels, cache=cache, keep_worse=True, **RUNS[name])
            rows = {row[0]: row for row in result.as_table()}
            accuracy, loss = rows["Accuracy"], rows["Log loss"]
            losses = " → ".join(cell.split()[0] for cell in loss[1:3])
            cells = [name, *accuracy[1:], losses, str(result.best_epoch), f"{perf_counter() - started:.0f}"]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
