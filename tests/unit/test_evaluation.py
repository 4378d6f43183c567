"""An evaluation scores what the model was not trained on, in the model's own terms, and counts what it leaves out."""

from __future__ import annotations

import csv
import json
import tarfile
from collections.abc import Callable
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import accuracy_score, average_precision_score, mean_absolute_error

from featpipe import FeatureCache, Model, evaluate, extract, load_model, train
from featpipe.data import LabelTable
from featpipe.diagnostics import write_findings
from featpipe.errors import ArchiveError, CacheError, CacheMismatchError, ConfigError
from featpipe.evaluation import SCHEMA
from featpipe.inference import Engine
from featpipe.metrics import score
from tests.support.logs import logged_warning


@pytest.fixture
def forward_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of images of all forward passes to come."""
    passes: list[int] = []
    embed = Engine.embed

    def counted(self: Engine, images: Any) -> Any:
        passes.append(len(images))
        return embed(self, images)

    monkeypatch.setattr(Engine, "embed", counted)
    return passes


@pytest.fixture
def embed(tiny: Any, tmp_path: Path) -> Callable[..., FeatureCache]:
    def extract_(archive: Any, name: str = "cache", **settings: Any) -> FeatureCache:
        return extract(archive, backbone=tiny, cache=tmp_path / name, **settings)

    return extract_


def labelled(folder: Path, values: dict[str, str], columns: str) -> LabelTable:
    """A table of labels for the images of a folder."""
    path = folder.parent / "labels.csv"
    path.write_text("\n".join([f"path,{columns}", *(f"{name},{value}" for name, value in values.items())]) + "\n")
    return LabelTable(path, label_column=columns)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jpg"))


def test_rows_trained_on_are_left_out_and_counted(embed: Any, make_folder: Any, tmp_path: Path) -> None:
    folder = make_folder(each=4)
    model = train(embed(folder))
    for number, path in enumerate(sorted(folder.rglob("*.jpg"))):
        (path.parent / f"copy-{number}.jpg").write_bytes(path.read_bytes())
    new = make_folder(each=9, name="new")  # its first four of each class are the same images
    (new / "stray.jpg").write_bytes((new / "ape" / "08.jpg").read_bytes())
    (new / "bee" / "08.jpg").write_bytes(b"no image")
    with logged_warning("1 unsupported"):
        cache = embed(new)
    found = evaluate(model, cache)
    unseen = [i for i, name in enumerate(cache.ids) if name.endswith(("4.jpg", "5.jpg", "6.jpg", "7.jpg", "8.jpg"))]
    unseen = [i for i in unseen if cache.ids[i] != "bee/08.jpg"]
    assert found.rows.tolist() == unseen
    assert found.left_out == {"unsupported": 1, "without a label": 1, "trained on": 12}
    assert len(found.rows) + sum(found.left_out.values()) == len(cache)
    probabilities = model.predict_proba_features(cache.features()[unseen])
    truth = [str(cache.ids[i]).split("/")[0] for i in unseen]
    assert np.array_equal(found.predicted, probabilities)
    best = np.array(model.classes)[probabilities.argmax(axis=1)]
    assert found.scores.metrics["accuracy"].value == accuracy_score(truth, best)
    assert found.scores.to_dict() == score("classification", truth, probabilities, model.classes).to_dict()
    assert "left out: 1 unsupported, 1 without a label, 12 trained on" in found.table()
    document = found.to_dict()
    assert json.loads(json.dumps(document)) == document
    assert (document["rows"], document["left_out"]) == (14, found.left_out)


def test_of_a_given_split_only_the_test_rows_are_scored(embed: Any, make_folder: Any) -> None:
    folder = make_folder()
    marks = {"00": "train", "01": "train", "02": "train", "03": "validation", "04": "test", "05": "test"}
    rows = [f"{name},{name.split('/')[0]},{marks[Path(name).stem]}" for name in files(folder)]
    table = folder.parent / "labels.csv"
    table.write_text("\n".join(["path,label,split", *rows]) + "\n")
    cache = embed(folder, labels=table)
    model = train(cache)
    found = evaluate(model, cache)
    assert [cache.ids[int(row)][-6:] for row in found.rows] == ["04.jpg", "05.jpg"] * 3
    assert found.left_out == {"not in the test split": 12}


def test_what_leaves_no_row_to_score_says_why(embed: Any, make_folder: Any) -> None:
    cache = embed(make_folder())
    with pytest.raises(CacheError, match=r"no row is left to score \(18 trained on\); evaluate on other images"):
        evaluate(train(cache), cache)


def test_another_embedding_is_refused_with_the_facts_that_differ(embed: Any, make_folder: Any) -> None:
    folder = make_folder()
    model = train(embed(folder))
    half = embed(folder, "half", storage="float16", precision="bf16")
    with pytest.raises(CacheMismatchError, match=r"precision is 'bf16', asked for 'fp32'; storage is 'float16'"):
        evaluate(model, half)
    other = embed(folder, "other")
    other.manifest["outputs"] = {"conv:avg": [8]}
    with pytest.raises(CacheMismatchError, match=r"holds conv:avg, the model was trained on 'pooled'"):
        evaluate(model, other)


def test_classes_that_the_model_does_not_know_are_named(embed: Any, make_folder: Any) -> None:
    model = train(embed(make_folder()))
    strange = embed(make_folder(("ape", "dog", "elk", "fox", "gnu"), each=8, name="strange"))
    with pytest.raises(ConfigError, match=r"does not know: 'dog', 'elk', 'fox' and 1 more; leave those"):
        evaluate(model, strange)


def test_classes_that_the_cache_lacks_keep_their_columns(embed: Any, make_folder: Any) -> None:
    model = train(embed(make_folder(("ape", "bee", "cow"), each=3)))
    fewer = embed(make_folder(("cow", "ape"), each=5, name="fewer"))
    found = evaluate(model, fewer)
    assert found.predicted.shape[1] == 3
    assert found.scores.classes == ("ape", "bee", "cow")
    assert found.scores.confusion is not None
    assert found.scores.confusion.sum(axis=1)[1] == 0


def test_labels_of_another_kind_are_refused(embed: Any, make_folder: Any) -> None:
    folder = make_folder()
    model = train(embed(folder))
    table = labelled(folder, dict.fromkeys(files(folder), "0.5"), "target")
    with pytest.raises(ConfigError, match="has labels for regression, the model does classification"):
        evaluate(model, embed(folder, labels=table))
    flat = folder / "ape"
    with pytest.raises(ConfigError, match="has no labels, the model does classification"):
        evaluate(model, embed(flat))


def test_archives_are_embedded_once_through_the_cache(
    tiny: Any, embed: Any, make_folder: Any, tmp_path: Path, forward_passes: list[int]
) -> None:
    model = train(embed(make_folder(each=3))).attach(tiny)
    new = make_folder(each=7, name="new")
    with tarfile.open(tmp_path / "new.tar", "w") as file:
        file.add(new, arcname="new")
    forward_passes.clear()
    first = evaluate(model, new, cache=tmp_path / "cache")
    assert sum(forward_passes) == 12  # nine of the 21 were embedded for training
    forward_passes.clear()
    again = evaluate(model, str(new), cache=tmp_path / "cache")
    packed = evaluate(model, [tmp_path / "new.tar"], cache=tmp_path / "cache")
    reopened = evaluate(model, str(first.cache.path))
    assert forward_passes == []
    for other in (again, packed, reopened):
        assert other.scores.to_dict() == first.scores.to_dict()
        assert other.left_out == {"trained on": 9}


def test_a_cache_is_scored_without_loading_the_backbone(embed: Any, make_folder: Any, tmp_path: Path) -> None:
    path = train(embed(make_folder(each=3))).save(tmp_path / "m.model")
    model = load_model(path)
    found = evaluate(model, embed(make_folder(each=6, name="new")))
    assert len(found.rows) == 9
    assert model._backbone is None


def test_what_cannot_be_evaluated_on_is_one_line(embed: Any, make_folder: Any, tmp_path: Path) -> None:
    cache = embed(make_folder())
    model = train(cache)
    with pytest.raises(ConfigError, match="nothing to evaluate on"):
        evaluate(model, [])
    with pytest.raises(ConfigError, match="2 caches were given; evaluate takes one cache, or archives"):
        evaluate(model, [cache.path, cache.path])
    with pytest.raises(ConfigError, match="a cache contains its labels"):
        evaluate(model, cache.path, labels=tmp_path / "labels.csv")
    with pytest.raises(CacheError, match="no such file"):
        evaluate(model, tmp_path / "gone.h5")


def trained(embed: Any, folder: Path, table: LabelTable, **settings: Any) -> Model:
    return train(embed(folder, labels=table), **settings)


def test_targets_are_matched_by_name(embed: Any, make_folder: Any) -> None:
    folder, new = make_folder(each=8), make_folder(each=12, name="new")
    rng = np.random.default_rng(0)
    numbers = {name: rng.normal(size=2).round(3) for name in files(new)}
    old = labelled(folder, {name: "{},{}".format(*numbers[name]) for name in files(folder)}, "height,weight")
    model = trained(embed, folder, old, head="linear")
    swapped = labelled(new, {name: "{1},{0}".format(*numbers[name]) for name in files(new)}, "weight,height")
    cache = embed(new, labels=swapped)
    assert (model.classes, cache.classes) == (("height", "weight"), ("weight", "height"))
    found = evaluate(model, cache)
    truth = np.array([numbers[cache.ids[int(row)]] for row in found.rows])
    assert len(truth) == 12
    assert found.scores.metrics["mae"].value == pytest.approx(mean_absolute_error(truth, found.predicted))
    other = labelled(new, {name: "{1},{0}".format(*numbers[name]) for name in files(new)}, "weight,depth")
    with pytest.raises(ConfigError, match="has no target 'height', which the model predicts; it has 'weight', 'depth'"):
        evaluate(model, embed(new, labels=other))


def test_several_labels_are_matched_by_name(embed: Any, make_folder: Any) -> None:
    folder, new = make_folder(each=6), make_folder(each=10, name="new")
    kinds = {"ape": "fur;big", "bee": "wings", "cow": "big;milk"}
    old = labelled(folder, {name: kinds[name[:3]] for name in files(folder)}, "labels")
    model = trained(embed, folder, old)
    kinds |= {"cow": "big"}  # nothing gives milk any more, so that the columns are others
    table = labelled(new, {name: kinds[name[:3]] for name in files(new)}, "labels")
    found = evaluate(model, embed(new, labels=table))
    truth = np.array(
        [[c in kinds[found.cache.ids[int(row)][:3]].split(";") for c in model.classes] for row in found.rows]
    )
    assert model.classes == ("big", "fur", "milk", "wings")
    columns = [0, 1, 3]
    oracle = average_precision_score(truth[:, columns], found.predicted[:, columns], average="macro")
    assert found.scores.metrics["mean_average_precision"].value == pytest.approx(oracle)
    table = labelled(new, {name: kinds[name[:3]] + ";tail" for name in files(new)}, "labels")
    with pytest.raises(ConfigError, match="does not know: 'tail'"):
        evaluate(model, embed(new, labels=table))


def strip(path: Path, out: Path, sides: tuple[int, int] = (30, 24)) -> None:
    """The same picture with other bytes: smaller, as a PNG."""
    with Image.open(path) as picture:
        picture.resize(sides).save(out)


@pytest.fixture
def judged(embed: Any, make_folder: Any) -> tuple[Any, FeatureCache, FeatureCache]:
    """A model, the cache that it was trained on, and one to judge it by, in which two images are copies."""
    trained = embed(make_folder(each=12))
    new = make_folder(each=20, name="new")
    for path in sorted(new.rglob("*.jpg")):
        if int(path.stem) < 12:
            path.unlink()
    for i in (3, 4):
        strip(new.parent / "photos" / "ape" / f"{i:02}.jpg", new / "ape" / f"copy-{i}.png", (39, 31))
    return train(trained, cv=3, params={"C": 1.0}), trained, embed(new)


def test_copies_of_training_images_are_found_and_the_score_without_them_shown(judged: Any) -> None:
    model, trained, cache = judged
    found = evaluate(model, cache, trained_on=trained, near=0.999)
    copies = found.duplicates
    names = {
        cache.ids[int(found.rows[a])]: trained.ids[int(found.reference.rows[b])]
        for a, b in zip(copies.training.rows, copies.training.others, strict=True)
    }
    assert names == {"ape/copy-3.png": "ape/03.jpg", "ape/copy-4.png": "ape/04.jpg"}
    kept = np.array(["copy" not in cache.ids[int(row)] for row in found.rows])
    oracle = accuracy_score(found.truth[kept], np.array(model.classes)[found.predicted[kept].argmax(axis=1)])
    assert copies.without.metrics["accuracy"].value == pytest.approx(oracle)
    assert "2 rows are near duplicates of a training image" in found.table()


def test_the_training_images_are_found_by_their_bytes_beside_the_data_and_never_by_a_name(
    judged: Any, tmp_path: Path, embed: Any, make_folder: Any
) -> None:
    model, trained, cache = judged
    assert evaluate(model, cache).reference.cache.path == trained.path
    model.history["trained_on"]["cache"] = cache.path.name  # of the name, but not the same
    missing = evaluate(model, cache)
    assert missing.reference is None
    assert "not checked" in missing.table()
    assert missing.learning_curve is None
    with pytest.raises(ConfigError, match="trained on none of its images; give the cache on which it was trained"):
        evaluate(model, cache, trained_on=cache)


def test_models_are_compared_on_rows_that_none_was_trained_on(judged: Any, embed: Any, make_folder: Any) -> None:
    model, _, cache = judged
    some = make_folder(each=15, name="some")  # images 12 to 14 of each class are in the test cache
    other = train(embed(some), "centroid")
    found = evaluate(model, cache, against=[other])
    assert found.left_out == {"trained on": 9}
    (rival,) = found.rivals
    assert rival.name == "centroid"
    theirs = evaluate(other, cache)
    assert theirs.rows.tolist() == found.rows.tolist()
    assert rival.scores.to_dict() == theirs.scores.to_dict()
    first, second = found.judged.is_correct, theirs.judged.is_correct
    assert rival.paired.only_first == (first & ~second).sum()
    assert rival.paired.only_second == (second & ~first).sum()
    assert "against centroid, on the same" in found.table()


def test_models_of_the_same_classes_in_another_order_are_compared_by_name(judged: Any) -> None:
    model, trained, cache = judged
    turned = train(trained, cv=None)
    turned.classes = model.classes[::-1]
    turned.head = Turned(model.head)
    (rival,) = evaluate(model, cache, against=[turned]).rivals
    assert (rival.paired.only_first, rival.paired.only_second) == (0, 0)
    assert rival.paired.contrasts["log_loss"].difference.value == pytest.approx(0, abs=1e-12)


class Turned:
    """A head whose columns stand the other way round."""

    def __init__(self, head: Any) -> None:
        self.head = head

    def predict_proba(self, X: Any) -> Any:
        return self.head.predict_proba(X)[:, ::-1]


def test_samples_of_a_table_are_left_out(judged: Any, tmp_path: Path) -> None:
    model, trained, cache = judged
    first = evaluate(model, cache, trained_on=trained, near=0.999)
    paths = write_findings(first.findings, tmp_path / "findings")
    table = tmp_path / "findings" / "near_duplicates.csv"
    assert table in paths
    found = evaluate(model, cache, without=table)
    assert found.left_out["named by --without"] >= 2
    assert not any("copy" in cache.ids[int(row)] for row in found.rows)
    strange = tmp_path / "strange.csv"
    strange.write_text("id\nnowhere.jpg\n")
    with pytest.raises(ArchiveError, match=r"none of its 1 paths, such as 'nowhere\.jpg', is an image of"):
        evaluate(model, cache, without=strange)


def test_labels_of_training_images_are_doubted_by_the_folds_that_did_not_see_them(
    embed: Any, make_folder: Any, tmp_path: Path
) -> None:
    folder = make_folder(each=12)
    names = {name: name.split("/")[0] for name in files(folder)}
    cache = embed(folder, labels=labelled(folder, names, "label"))
    train(cache, cv=3, params={"C": 1.0}, findings=tmp_path / "found")
    with open(tmp_path / "found" / "mistakes.csv", newline="") as file:
        mistakes = list(csv.DictReader(file))
    estimate = train(cache, cv=3, params={"C": 1.0}).scores["cross_validation"]
    assert len(mistakes) == round(36 * (1 - estimate["metrics"]["accuracy"]["value"]))
    assert all(names[row["id"]] == row["label"] != row["predicted"] for row in mistakes)
    with pytest.raises(ConfigError, match="findings are of images that were held out; give cv"):
        train(cache, findings=tmp_path / "found")


def test_the_json_is_as_its_schema_says(judged: Any, embed: Any, make_folder: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    model, trained, cache = judged
    schema = json.loads((resources("featpipe.evaluation") / "schema.json").read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    found = evaluate(model, cache, against=[train(trained, "centroid")])
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    jsonschema.validate(document, schema)
    assert document["schema"] == SCHEMA
    assert set(document) == set(schema["properties"])
    assert set(document["findings"]) < set(schema["properties"]["findings"]["properties"])
    assert document["sets"][1]["level"] == 0.9
    assert 0 <= document["novelty"]["median"] < 1
    alone = json.loads(json.dumps(evaluate(train(embed(make_folder(name="few"))), cache).to_dict(), allow_nan=False))
    jsonschema.validate(alone, schema)  # a model without cross-validation, whose training images are few


def test_the_schema_keeps_every_key_of_version_1_0() -> None:
    schema = json.loads((resources("featpipe.evaluation") / "schema.json").read_text("utf-8"))
    kept = "schema featpipe model cache fingerprint rows left_out how task n metrics per_class confusion classes"
    assert set(schema["required"]) >= {
        *kept.split(),
        "duplicates",
        "against",
        "learning_curve",
        "sets",
        "novelty",
        "findings",
    }


def test_a_learning_curve_ends_at_the_model_itself(embed: Any, make_folder: Any) -> None:
    model = train(embed(make_folder(each=60)), params={"C": 1.0})
    cache = embed(make_folder(each=90, name="new"))
    found = evaluate(model, cache)
    curve = found.learning_curve
    assert curve.sizes == (45, 90, 180)
    assert curve.errors[-1] == pytest.approx(1 - found.scores.metrics["accuracy"].value)
    assert curve.ahead == 360
    assert curve.to_dict() == evaluate(model, cache).learning_curve.to_dict()


def test_sets_and_novelty_are_measured_on_the_rows(judged: Any) -> None:
    model, _, cache = judged
    found = evaluate(model, cache)
    at = next(coverage for coverage in found.coverage if coverage.level == 0.8)
    sets = model.predict_sets_features(found.features, 0.8)
    holds = [label in answers for label, answers in zip(found.truth, sets, strict=True)]
    assert at.coverage.value == pytest.approx(np.mean(holds))
    assert at.size == pytest.approx(np.mean([len(answers) for answers in sets]))
    np.testing.assert_array_equal(found.novelty, model.novelty_features(found.features))


def test_a_notebook_shows_the_scores_as_a_table(embed: Any, make_folder: Any) -> None:
    model = train(embed(make_folder(("<i>", "bee"))), params={"C": 1.0})
    shown = evaluate(model, embed(make_folder(("<i>", "bee"), each=12, name="others")))._repr_html_()
    assert "<th>Accuracy</th>" in shown
    assert "<i>" not in shown
