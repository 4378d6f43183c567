"""Whether predictions come as fast as embeddings: the same images through extract and through predict, in turns.

500 × 375 JPEGs in a .tar, EfficientNet-Lite0 in fp32; each in a process of its own that times the call alone, from the
listing of the archive to the finished file.

    python tests/benchmarks/prediction.py [images] [rounds]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

import extraction

CALL = """
import json, sys, time
from pathlib import Path
import featpipe
what, tar, model, out = sys.argv[1:]
backbone = featpipe.load_model(model, device="cpu")
backbone.backbone
import featpipe.extraction, featpipe.prediction
also = [featpipe.load_model(model)] if what == "two models" else []
started = time.perf_counter()
if what == "extract":
    featpipe.extract(tar, out=out + "/a.h5", **backbone.extraction())
elif what == "from a cache":
    featpipe.predict(backbone, tar, out + "/b.csv", cache=Path(model).parent)
elif what == "into a cache":
    featpipe.predict(backbone, tar, out + "/p.csv", cache=out)
elif what == "again":
    featpipe.predict(backbone, tar, Path(model).parent / "again.csv")
else:
    featpipe.predict(backbone, tar, None if what == "standard output" else out + "/p.csv", also=also)
print(json.dumps(time.perf_counter() - started))
"""
WAYS = ("extract", "into a file", "into a cache", "two models", "standard output", "from a cache", "again")


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 800
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    with tempfile.TemporaryDirectory() as name:
        folder, tar, model = Path(name) / "photographs", Path(name) / "photographs.tar", Path(name) / "a.model"
        extraction.photographs(folder, n // extraction.REPEATS)
        extraction.pack(folder, tar)
        extraction.answer(TRAIN, tar, folder, Path(name) / "photographs.h5", model)
        extraction.answer(CALL.replace('"extract"', '"none"'), "again", tar, model, name)
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way in WAYS:
                with tempfile.TemporaryDirectory() as out:
                    seconds[way].append(extraction.answer(CALL, way, tar, model, out))
            print({way: round(values[-1], 2) for way, values in seconds.items()}, file=sys.stderr, flush=True)
    for way in WAYS:
        ratio = statistics.median(ours / theirs for ours, theirs in zip(seconds[way], seconds["extract"], strict=True))
        middle = statistics.median(seconds[way])
        print(f"{way:<16}{middle:7.2f} s {n / middle:9.1f} images/s {ratio:6.3f} × the time of extract", flush=True)


TRAIN = """
import json, sys
import featpipe
tar, folder, cache, model = sys.argv[1:]
labelled = featpipe.extract(folder, out=cache + ".labelled.h5", device="cpu")
featpipe.train(labelled, params={"C": 1.0}, cv=None).save(model)
featpipe.extract(tar, out=cache, device="cpu")
print(json.dumps(0))
"""


if __name__ == "__main__":
    main()
