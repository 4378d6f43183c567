"""Class-incremental learning on real images: how much each method forgets.

    python tests/benchmarks/expansion.py [tiles | CACHE SIZES] [HEAD]...

"tiles" are those of the demo, 10 photographs and then 7: trained on left halves, tested on right halves. Or give a
CACHE with labels and a split, and the number of classes of each step, such as 3,3,3. Each method goes through all steps
by itself; ``joint`` uses all old images again, the others use the data that the model retains: statistics, importances
and 20 embeddings of each class. The table gives means over three orders of the classes after the last step.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from time import perf_counter

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from featpipe import FeatureCache, expand, extract, train
from featpipe.cache import write_cache
from featpipe.data import Labels, write_tiles
from featpipe.errors import ConfigError
from featpipe.incremental import METHODS, MethodOutcome
from featpipe.storage import StringColumn

ORDERS = 3
KEEP = "statistics,importances,rows=20"


def select_classes(cache: FeatureCache, names: Sequence[str], path: Path) -> FeatureCache:
    """Write a cache with some classes of another one."""
    rows = np.flatnonzero(np.isin(cache.label_table.values, [cache.classes.index(name) for name in names]) & cache.ok)
    table, features = cache.table(), np.asarray(cache.features())
    selected_table = type(table)(
        ids=StringColumn.from_strings(cache.ids[int(row)] for row in rows),
        status=table.status[rows],
        digests=table.digests[rows],
        stamps=table.stamps[rows],
        split=table.split[rows],
        labels=Labels.from_class_names(cache.label_table.take(rows).y.tolist()),
    )
    manifest = {"facts": cache.facts, "backbone": cache.manifest["backbone"]}
    write_cache(
        path, selected_table, manifest, cache.shapes, "float32", lambda _, start, stop: features[rows[start:stop]]
    )
    return FeatureCache(path)


def make_steps(cache: FeatureCache, sizes: Sequence[int], order: int, folder: Path) -> list[FeatureCache]:
    names = list(cache.classes)
    if order:
        np.random.default_rng(order).shuffle(names)
    cuts = np.cumsum([0, *sizes])
    return [select_classes(cache, names[start:stop], folder / f"{order}-{start}.h5") for start, stop in pairwise(cuts)]


def run_method(head: str, step_caches: Sequence[FeatureCache], method: str) -> tuple[MethodOutcome, float] | None:
    """Run all steps of a method; the outcome of the last step, and the seconds of all."""
    model, seconds, outcome = train(step_caches[0], head, keep=KEEP), 0.0, None
    for number, new_cache in enumerate(step_caches[1:], 1):
        old_caches = step_caches[:number]
        started = perf_counter()
        try:
            expansion = expand(
                model, [*old_caches, new_cache] if method == "joint" else new_cache, method=method, test=old_caches
            )
        except ConfigError:  # the head does not support the method
            return None
        seconds += perf_counter() - started
        model, outcome = expansion.model, expansion.outcomes[0]
    assert outcome is not None
    return outcome, seconds


def iter_table_rows(head: str, orders: Sequence[Sequence[FeatureCache]]) -> Iterator[str]:
    joint_accuracies: list[float] = []
    for method in METHODS:
        runs = [run_method(head, step_caches, method) for step_caches in orders]
        if None in runs:
            continue
        outcomes = [pair[0] for pair in runs if pair]
        accuracies = [outcome.all.value for outcome in outcomes if outcome.all]
        joint_accuracies = joint_accuracies or accuracies
        old, new, forgetting = (
            np.mean([getattr(outcome, name).value for outcome in outcomes]) for name in ("old", "new", "forgetting")
        )
        differences = [
            100 * (joint_accuracy - accuracy)
            for accuracy, joint_accuracy in zip(accuracies, joint_accuracies, strict=True)
        ]
        differences_text = " ".join(f"{points:.1f}" for points in differences)
        cells = [f"{value:.3f}" for value in (old, new, np.mean(accuracies))]
        cells += [f"{np.mean(differences):.1f} ({differences_text})", f"{forgetting:.3f}"]
        megabytes = np.mean([outcome.bytes for outcome in outcomes]) / 1e6
        yield f"| {head} | {method} | {' | '.join(cells)} | {megabytes:.1f} MB |"


def main(arguments: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not arguments or arguments[0] == "tiles":
            archive, table = write_tiles(folder)
            cache, sizes = extract(archive, labels=table, cache=folder, out=folder / "all.h5"), [10, 7]
            heads = arguments[1:]
        else:
            cache, sizes = FeatureCache(arguments[0]), [int(size) for size in arguments[1].split(",")]
            heads = arguments[2:]
        orders = [make_steps(cache, sizes, order, folder) for order in range(ORDERS)]
        print("| head | method | old | new | all | points below joint (each order) | forgetting | keeps |")
        print("|---|---|---|---|---|---|---|---|")
        for head in heads or ["logistic", "lda"]:
            for line in iter_table_rows(head, orders):
                print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
