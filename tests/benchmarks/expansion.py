"""More classes for a trained model: what each method forgets, on real images.

    python tests/benchmarks/expansion.py [tiles | CACHE SIZES] [HEAD]...

"tiles" are the demonstration's, 10 photographs and then 7: trained on left halves, judged on right halves. Or a CACHE
of labels that came with a split, and how many classes come in each step, as 3,3,3. Each method goes through all steps
by itself; ``joint`` sees all old images again, the others what the model keeps: statistics, importances and 20
embeddings of each class. Classes come in three orders; the table gives means over these after the last step.
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


def part(cache: FeatureCache, names: Sequence[str], path: Path) -> FeatureCache:
    """A cache of some classes of another."""
    rows = np.flatnonzero(np.isin(cache.label_table.values, [cache.classes.index(name) for name in names]) & cache.ok)
    table, features = cache.table(), np.asarray(cache.features())
    own = type(table)(
        ids=StringColumn.from_strings(cache.ids[int(row)] for row in rows),
        status=table.status[rows],
        digests=table.digests[rows],
        stamps=table.stamps[rows],
        split=table.split[rows],
        labels=Labels.from_class_names(cache.label_table.take(rows).y.tolist()),
    )
    manifest = {"facts": cache.facts, "backbone": cache.manifest["backbone"]}
    write_cache(path, own, manifest, cache.shapes, "float32", lambda _, start, stop: features[rows[start:stop]])
    return FeatureCache(path)


def steps(cache: FeatureCache, sizes: Sequence[int], order: int, folder: Path) -> list[FeatureCache]:
    names = list(cache.classes)
    if order:
        np.random.default_rng(order).shuffle(names)
    cuts = np.cumsum([0, *sizes])
    return [part(cache, names[start:stop], folder / f"{order}-{start}.h5") for start, stop in pairwise(cuts)]


def run(head: str, parts: Sequence[FeatureCache], method: str) -> tuple[MethodOutcome, float] | None:
    """The last step's outcome, and the seconds of all steps."""
    model, seconds, outcome = train(parts[0], head, keep=KEEP), 0.0, None
    for number, new in enumerate(parts[1:], 1):
        old = parts[:number]
        started = perf_counter()
        try:
            found = expand(model, [*old, new] if method == "joint" else new, method=method, test=old)
        except ConfigError:  # not for this head
            return None
        seconds += perf_counter() - started
        model, outcome = found.model, found.outcomes[0]
    assert outcome is not None
    return outcome, seconds


def figures(head: str, orders: Sequence[Sequence[FeatureCache]]) -> Iterator[str]:
    best: list[float] = []
    for method in METHODS:
        found = [run(head, parts, method) for parts in orders]
        if None in found:
            continue
        outcomes = [pair[0] for pair in found if pair]
        accuracies = [outcome.all.value for outcome in outcomes if outcome.all]
        best = best or accuracies
        old, new, forgotten = (
            np.mean([getattr(outcome, name).value for outcome in outcomes]) for name in ("old", "new", "forgetting")
        )
        apart = [100 * (there - here) for here, there in zip(accuracies, best, strict=True)]
        each, keeps = " ".join(f"{points:.1f}" for points in apart), np.mean([outcome.bytes for outcome in outcomes])
        shown = f"{old:.3f} | {new:.3f} | {np.mean(accuracies):.3f} | {np.mean(apart):.1f} ({each}) | {forgotten:.3f}"
        yield f"| {head} | {method} | {shown} | {keeps / 1e6:.1f} MB |"


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
        orders = [steps(cache, sizes, order, folder) for order in range(ORDERS)]
        print("| head | method | old | new | all | points below joint (each order) | forgetting | keeps |")
        print("|---|---|---|---|---|---|---|---|")
        for head in heads or ["logistic", "lda"]:
            for line in figures(head, orders):
                print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
