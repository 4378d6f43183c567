"""Evaluation: which rows are scored, scores in the model's terms, comparisons, duplicates and the JSON document."""

from __future__ import annotations

import csv
import json
import tarfile
from collections.abc import Callable
from importlib.resources import files
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
    """The number of images of each forward pass from now on."""
    passes: list[int] = []
    embed = Engine.embed

    def counting_embed(self: Engine, images: Any) -> Any:
        passes.append(len(images))
        return embed(self, images)

    monkeypatch.setattr(Engine, "embed", counting_embed)
    return passes


@pytest.fixture
def embed(tiny: Any, tmp_path: Path) -> Callable[..., FeatureCache]:
    def extract_(archive: Any, name: str = "cache", **settings: Any) -> FeatureCache:
        return extract(archive, backbone=tiny, cache=tmp_path / name, **settings)

    return extract_


def make_label_table(folder: Path, values: dict[str, str], columns: str) -> LabelTable:
    """A table of labels for the images of a folder."""
    path = folder.parent / "labels.csv"
    path.write_text("\n".join([f"path,{columns}", *(f"{name},{value}" for name, value in values.items())]) + "\n")
    return LabelTable(path, label_column=columns)


def list_images(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jpg"))


def test_training_rows_are_left_out_and_counted(embed: Any, make_folder: Any, tmp_path: Path) -> None:
    folder = make_folder(each=4)
    model = train(embed(folder), tune=False)
    for number, path in enumerate(sorted(folder.rglob("*.jpg"))):
        (path.parent / f"copy-{number}.jpg").write_bytes(path.read_bytes())
    new_folder = make_folder(each=9, name="new")  # its first four of each class are the same images
    (new_folder / "stray.jpg").write_bytes((new_folder / "ape" / "08.jpg").read_bytes())
    (new_folder / "bee" / "08.jpg").write_bytes(b"no image")
    with logged_warning("1 unsupported"):
        cache = embed(new_folder)
    evaluation = evaluate(model, cache)
    unseen_rows = [
        i for i, name in enumerate(cache.ids) if name.endswith(("4.jpg", "5.jpg", "6.jpg", "7.jpg", "8.jpg"))
    ]
    unseen_rows = [i for i in unseen_rows if cache.ids[i] != "bee/08.jpg"]
    assert evaluation.rows.tolist() == unseen_rows
    assert evaluation.left_out == {"unsupported": 1, "without a label": 1, "trained on": 12}
    assert len(evaluation.rows) + sum(evaluation.left_out.values()) == len(cache)
    probabilities = model.predict_proba_features(cache.features()[unseen_rows])
    truth = [str(cache.ids[i]).split("/")[0] for i in unseen_rows]
    assert np.array_equal(evaluation.predicted, probabilities)
    predicted_names = np.array(model.classes)[probabilities.argmax(axis=1)]
    assert evaluation.scores.metrics["accuracy"].value == accuracy_score(truth, predicted_names)
    assert evaluation.scores.to_dict() == score("classification", truth, probabilities, model.classes).to_dict()
    assert "left out: 1 unsupported, 1 without a label, 12 trained on" in evaluation.table()
    document = evaluation.to_dict()
    assert json.loads(json.dumps(document)) == document
    assert (document["rows"], document["left_out"]) == (14, evaluation.left_out)


def test_only_the_test_rows_of_a_split_are_scored(embed: Any, make_folder: Any) -> None:
    folder = make_folder()
    marks = {"00": "train", "01": "train", "02": "train", "03": "validation", "04": "test", "05": "test"}
    rows = [f"{name},{name.split('/')[0]},{marks[Path(name).stem]}" for name in list_images(folder)]
    table = folder.parent / "labels.csv"
    table.write_text("\n".join(["path,label,split", *rows]) + "\n")
    cache = embed(folder, labels=table)
    model = train(cache, tune=False)
    evaluation = evaluate(model, cache)
    assert [cache.ids[int(row)][-6:] for row in evaluation.rows] == ["04.jpg", "05.jpg"] * 3
    assert evaluation.left_out == {"not in the test split": 12}


def test_an_evaluation_without_rows_raises_with_the_reasons(embed: Any, make_folder: Any) -> None:
    cache = embed(make_folder())
    with pytest.raises(CacheError, match=r"no row is left to score \(18 trained on\); evaluate on other images"):
        evaluate(train(cache, tune=False), cache)


def test_a_cache_of_other_embeddings_is_refused_with_the_differences(embed: Any, make_folder: Any) -> None:
    folder = make_folder()
    model = train(embed(folder), tune=False)
    bf16_cache = embed(folder, "half", storage="float16", precision="bf16")
    with pytest.raises(CacheMismatchError, match=r"precision is 'bf16', asked for 'fp32'; storage is 'float16'"):
        evaluate(model, bf16_cache)
    other_output_cache = embed(folder, "other")
    other_output_cache.manifest["outputs"] = {"conv:avg": [8]}
    with pytest.raises(CacheMismatchError, match=r"contains conv:avg, the model was trained on 'pooled'"):
        evaluate(model, other_output_cache)


def test_unknown_classes_raise_an_error_that_names_them(embed: Any, make_folder: Any) -> None:
    model = train(embed(make_folder()), tune=False)
    other_cache = embed(make_folder(("ape", "dog", "elk", "fox", "gnu"), each=8, name="other"))
    with pytest.raises(ConfigError, match=r"does not know: 'dog', 'elk', 'fox' and 1 more; leave those"):
        evaluate(model, other_cache)


def test_classes_missing_from_the_cache_keep_their_columns(embed: Any, make_folder: Any) -> None:
    model = train(embed(make_folder(("ape", "bee", "cow"), each=3)), tune=False)
    cache = embed(make_folder(("cow", "ape"), each=5, name="fewer"))
    evaluation = evaluate(model, cache)
    assert evaluation.predicted.shape[1] == 3
    assert evaluation.scores.classes == ("ape", "bee", "cow")
    assert evaluation.scores.confusion is not None
    assert evaluation.scores.confusion.sum(axis=1)[1] == 0


def test_labels_for_another_task_are_refused(embed: Any, make_folder: Any) -> None:
    folder = make_folder()
    model = train(embed(folder), tune=False)
    table = make_label_table(folder, dict.fromkeys(list_images(folder), "0.5"), "target")
    with pytest.raises(ConfigError, match="has labels for regression, the model is for classification"):
        evaluate(model, embed(folder, labels=table))
    class_folder = folder / "ape"
    with pytest.raises(ConfigError, match="has no labels, the model is for classification"):
        evaluate(model, embed(class_folder))


def test_an_archive_is_embedded_only_once(
    tiny: Any, embed: Any, make_folder: Any, tmp_path: Path, forward_passes: list[int]
) -> None:
    model = train(embed(make_folder(each=3)), tune=False).attach(tiny)
    new_folder = make_folder(each=7, name="new")
    with tarfile.open(tmp_path / "new.tar", "w") as file:
        file.add(new_folder, arcname="new")
    forward_passes.clear()
    first = evaluate(model, new_folder, cache=tmp_path / "cache")
    assert sum(forward_passes) == 12  # nine of the 21 were embedded for training
    forward_passes.clear()
    repeated = evaluate(model, str(new_folder), cache=tmp_path / "cache")
    from_tar = evaluate(model, [tmp_path / "new.tar"], cache=tmp_path / "cache")
    from_cache = evaluate(model, str(first.cache.path))
    assert forward_passes == []
    for evaluation in (repeated, from_tar, from_cache):
        assert evaluation.scores.to_dict() == first.scores.to_dict()
        assert evaluation.left_out == {"trained on": 9}


def test_a_cache_is_scored_without_loading_the_backbone(embed: Any, make_folder: Any, tmp_path: Path) -> None:
    path = train(embed(make_folder(each=3)), tune=False).save(tmp_path / "m.model")
    model = load_model(path)
    evaluation = evaluate(model, embed(make_folder(each=6, name="new")))
    assert len(evaluation.rows) == 9
    assert model._backbone is None


def test_invalid_data_arguments_raise_errors(embed: Any, make_folder: Any, tmp_path: Path) -> None:
    cache = embed(make_folder())
    model = train(cache, tune=False)
    with pytest.raises(ConfigError, match="nothing to evaluate on"):
        evaluate(model, [])
    with pytest.raises(ConfigError, match="2 caches were given; give one cache, or archives"):
        evaluate(model, [cache.path, cache.path])
    with pytest.raises(ConfigError, match="a cache contains its labels"):
        evaluate(model, cache.path, labels=tmp_path / "labels.csv")
    with pytest.raises(CacheError, match="no such file"):
        evaluate(model, tmp_path / "gone.h5")


def train_on_table(embed: Any, folder: Path, table: LabelTable, **settings: Any) -> Model:
    return train(embed(folder, labels=table), **settings)


def test_regression_targets_are_matched_by_name(embed: Any, make_folder: Any) -> None:
    folder, new_folder = make_folder(each=8), make_folder(each=12, name="new")
    rng = np.random.default_rng(0)
    targets_by_name = {name: rng.normal(size=2).round(3) for name in list_images(new_folder)}
    training_table = make_label_table(
        folder, {name: "{},{}".format(*targets_by_name[name]) for name in list_images(folder)}, "height,weight"
    )
    model = train_on_table(embed, folder, training_table, head="linear")
    swapped_table = make_label_table(
        new_folder,
        {name: "{1},{0}".format(*targets_by_name[name]) for name in list_images(new_folder)},
        "weight,height",
    )
    cache = embed(new_folder, labels=swapped_table)
    assert (model.classes, cache.classes) == (("height", "weight"), ("weight", "height"))
    evaluation = evaluate(model, cache)
    truth = np.array([targets_by_name[cache.ids[int(row)]] for row in evaluation.rows])
    assert len(truth) == 12
    assert evaluation.scores.metrics["mae"].value == pytest.approx(mean_absolute_error(truth, evaluation.predicted))
    other_table = make_label_table(
        new_folder, {name: "{1},{0}".format(*targets_by_name[name]) for name in list_images(new_folder)}, "weight,depth"
    )
    with pytest.raises(ConfigError, match="has no target 'height', which the model predicts; it has 'weight', 'depth'"):
        evaluate(model, embed(new_folder, labels=other_table))


def test_multilabel_columns_are_matched_by_name(embed: Any, make_folder: Any) -> None:
    folder, new_folder = make_folder(each=6), make_folder(each=10, name="new")
    labels_by_class = {"ape": "fur;big", "bee": "wings", "cow": "big;milk"}
    training_table = make_label_table(
        folder, {name: labels_by_class[name[:3]] for name in list_images(folder)}, "labels"
    )
    model = train_on_table(embed, folder, training_table)
    labels_by_class |= {"cow": "big"}  # no image has the label milk, so that the columns differ
    table = make_label_table(
        new_folder, {name: labels_by_class[name[:3]] for name in list_images(new_folder)}, "labels"
    )
    evaluation = evaluate(model, embed(new_folder, labels=table))
    truth = np.array(
        [
            [c in labels_by_class[evaluation.cache.ids[int(row)][:3]].split(";") for c in model.classes]
            for row in evaluation.rows
        ]
    )
    assert model.classes == ("big", "fur", "milk", "wings")
    columns = [0, 1, 3]
    expected = average_precision_score(truth[:, columns], evaluation.predicted[:, columns], average="macro")
    assert evaluation.scores.metrics["mean_average_precision"].value == pytest.approx(expected)
    table = make_label_table(
        new_folder, {name: labels_by_class[name[:3]] + ";tail" for name in list_images(new_folder)}, "labels"
    )
    with pytest.raises(ConfigError, match="does not know: 'tail'"):
        evaluate(model, embed(new_folder, labels=table))


def save_resized_copy(path: Path, out: Path, size: tuple[int, int]) -> None:
    """Save a near duplicate: the image at another size, as a PNG."""
    with Image.open(path) as image:
        image.resize(size).save(out)


@pytest.fixture
def model_and_caches(embed: Any, make_folder: Any) -> tuple[Any, FeatureCache, FeatureCache]:
    """A model, its training cache, and a test cache with near duplicates of two training images."""
    training_cache = embed(make_folder(each=12))
    new_folder = make_folder(each=20, name="new")
    for path in sorted(new_folder.rglob("*.jpg")):
        if int(path.stem) < 12:
            path.unlink()
    for i in (3, 4):
        save_resized_copy(
            new_folder.parent / "photos" / "ape" / f"{i:02}.jpg", new_folder / "ape" / f"copy-{i}.png", (39, 31)
        )
    return train(training_cache, cv=3, params={"C": 1.0}), training_cache, embed(new_folder)


def test_near_duplicates_of_training_images_are_found_and_scored_without(model_and_caches: Any) -> None:
    model, training_cache, cache = model_and_caches
    evaluation = evaluate(model, cache, trained_on=training_cache, near=0.999)
    duplicates = evaluation.duplicates
    names = {
        cache.ids[int(evaluation.rows[a])]: training_cache.ids[int(evaluation.reference.rows[b])]
        for a, b in zip(duplicates.training.rows, duplicates.training.others, strict=True)
    }
    assert names == {"ape/copy-3.png": "ape/03.jpg", "ape/copy-4.png": "ape/04.jpg"}
    is_original = np.array(["copy" not in cache.ids[int(row)] for row in evaluation.rows])
    expected = accuracy_score(
        evaluation.truth[is_original], np.array(model.classes)[evaluation.predicted[is_original].argmax(axis=1)]
    )
    assert duplicates.without.metrics["accuracy"].value == pytest.approx(expected)
    assert "2 rows are near duplicates of a training image" in evaluation.table()


def test_the_training_cache_is_found_next_to_the_data_and_verified_by_digests(
    model_and_caches: Any, tmp_path: Path, embed: Any, make_folder: Any
) -> None:
    model, training_cache, cache = model_and_caches
    assert evaluate(model, cache).reference.cache.path == training_cache.path
    model.history["trained_on"]["cache"] = cache.path.name  # a file of this name exists, but is another cache
    evaluation = evaluate(model, cache)
    assert evaluation.reference is None
    assert "not checked" in evaluation.table()
    assert evaluation.learning_curve is None
    with pytest.raises(ConfigError, match="trained on none of its images; give the cache on which it was trained"):
        evaluate(model, cache, trained_on=cache)


def test_models_are_compared_on_rows_unseen_by_all(model_and_caches: Any, embed: Any, make_folder: Any) -> None:
    model, _, cache = model_and_caches
    folder = make_folder(each=15, name="overlap")  # images 12 to 14 of each class are in the test cache
    other_model = train(embed(folder), "centroid")
    evaluation = evaluate(model, cache, against=[other_model])
    assert evaluation.left_out == {"trained on": 9}
    (baseline,) = evaluation.rivals
    assert baseline.name == "centroid"
    other_evaluation = evaluate(other_model, cache)
    assert other_evaluation.rows.tolist() == evaluation.rows.tolist()
    assert baseline.scores.to_dict() == other_evaluation.scores.to_dict()
    is_correct, is_other_correct = evaluation.judged.is_correct, other_evaluation.judged.is_correct
    assert baseline.paired.only_first == (is_correct & ~is_other_correct).sum()
    assert baseline.paired.only_second == (is_other_correct & ~is_correct).sum()
    assert "against centroid, on the same" in evaluation.table()


def test_models_with_reordered_classes_are_compared_by_class_name(model_and_caches: Any) -> None:
    model, training_cache, cache = model_and_caches
    reordered = train(training_cache, cv=None)
    reordered.classes = model.classes[::-1]
    reordered.head = ReversedHead(model.head)
    (baseline,) = evaluate(model, cache, against=[reordered]).rivals
    assert (baseline.paired.only_first, baseline.paired.only_second) == (0, 0)
    assert baseline.paired.contrasts["log_loss"].difference.value == pytest.approx(0, abs=1e-12)


class ReversedHead:
    """A head with its columns in reverse order."""

    def __init__(self, head: Any) -> None:
        self.head = head

    def predict_proba(self, X: Any) -> Any:
        return self.head.predict_proba(X)[:, ::-1]


def test_samples_listed_in_a_table_are_left_out(model_and_caches: Any, tmp_path: Path) -> None:
    model, training_cache, cache = model_and_caches
    first = evaluate(model, cache, trained_on=training_cache, near=0.999)
    paths = write_findings(first.findings, tmp_path / "findings")
    table = tmp_path / "findings" / "near_duplicates.csv"
    assert table in paths
    evaluation = evaluate(model, cache, without=table)
    assert evaluation.left_out["named by --without"] >= 2
    assert not any("copy" in cache.ids[int(row)] for row in evaluation.rows)
    for name in ("mistakes", "unsure"):
        with pytest.raises(ConfigError, match=f"{name}.csv: has the column 'predicted', so its images were"):
            evaluate(model, cache, without=tmp_path / "findings" / f"{name}.csv")
    unknown = tmp_path / "unknown.csv"
    unknown.write_text("id\nnowhere.jpg\n")
    with pytest.raises(ArchiveError, match=r"none of its 1 paths is an image of .*, the first is 'nowhere\.jpg'"):
        evaluate(model, cache, without=unknown)


def test_findings_of_training_come_from_out_of_fold_predictions(embed: Any, make_folder: Any, tmp_path: Path) -> None:
    folder = make_folder(each=12)
    names = {name: name.split("/")[0] for name in list_images(folder)}
    cache = embed(folder, labels=make_label_table(folder, names, "label"))
    train(cache, cv=3, params={"C": 1.0}, findings=tmp_path / "findings")
    with open(tmp_path / "findings" / "mistakes.csv", newline="") as file:
        mistakes = list(csv.DictReader(file))
    estimate = train(cache, cv=3, params={"C": 1.0}).scores["cross_validation"]
    assert len(mistakes) == round(36 * (1 - estimate["metrics"]["accuracy"]["value"]))
    assert all(names[row["id"]] == row["label"] != row["predicted"] for row in mistakes)
    with pytest.raises(ConfigError, match="findings are made from predictions on held-out images; give cv"):
        train(cache, findings=tmp_path / "findings")


def test_the_json_document_validates_against_the_schema(model_and_caches: Any, embed: Any, make_folder: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    model, training_cache, cache = model_and_caches
    schema = json.loads((files("featpipe.evaluation") / "schema.json").read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    evaluation = evaluate(model, cache, against=[train(training_cache, "centroid")])
    document = json.loads(json.dumps(evaluation.to_dict(), allow_nan=False))
    jsonschema.validate(document, schema)
    assert document["schema"] == SCHEMA
    assert set(document) == set(schema["properties"])
    assert set(document["findings"]) < set(schema["properties"]["findings"]["properties"])
    assert document["sets"][1]["level"] == 0.9
    assert 0 <= document["novelty"]["median"] < 1
    document_of_small_model = json.loads(
        json.dumps(evaluate(train(embed(make_folder(name="few")), tune=False), cache).to_dict(), allow_nan=False)
    )
    jsonschema.validate(
        document_of_small_model, schema
    )  # of a model with few training images and without cross-validation


def test_the_schema_keeps_every_key_of_version_1_0() -> None:
    schema = json.loads((files("featpipe.evaluation") / "schema.json").read_text("utf-8"))
    keys = "schema featpipe model cache fingerprint rows left_out how task n metrics per_class confusion classes"
    assert set(schema["required"]) >= {
        *keys.split(),
        "duplicates",
        "against",
        "learning_curve",
        "sets",
        "novelty",
        "findings",
    }


def test_the_last_point_of_a_learning_curve_is_the_model_itself(embed: Any, make_folder: Any) -> None:
    model = train(embed(make_folder(each=60)), params={"C": 1.0})
    cache = embed(make_folder(each=90, name="new"))
    evaluation = evaluate(model, cache)
    curve = evaluation.learning_curve
    assert curve.sizes == (45, 90, 180)
    assert curve.errors[-1] == pytest.approx(1 - evaluation.scores.metrics["accuracy"].value)
    assert curve.ahead == 360
    assert curve.to_dict() == evaluate(model, cache).learning_curve.to_dict()


def test_coverage_and_novelty_match_the_model(model_and_caches: Any) -> None:
    model, _, cache = model_and_caches
    evaluation = evaluate(model, cache)
    measured = next(coverage for coverage in evaluation.coverage if coverage.level == 0.8)
    sets = model.predict_sets_features(evaluation.features, 0.8)
    is_covered = [label in prediction_set for label, prediction_set in zip(evaluation.truth, sets, strict=True)]
    assert measured.coverage.value == pytest.approx(np.mean(is_covered))
    assert measured.size == pytest.approx(np.mean([len(prediction_set) for prediction_set in sets]))
    np.testing.assert_array_equal(evaluation.novelty, model.novelty_features(evaluation.features))


def test_the_notebook_representation_is_an_escaped_table(embed: Any, make_folder: Any) -> None:
    model = train(embed(make_folder(("<i>", "bee"))), params={"C": 1.0})
    html = evaluate(model, embed(make_folder(("<i>", "bee"), each=12, name="others")))._repr_html_()
    assert "<th>Accuracy</th>" in html
    assert "<i>" not in html
