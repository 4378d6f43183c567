"""One row for every sample, in the archive's order, as it is made; a file is whole or absent."""

from __future__ import annotations

import csv
import json
import os
import stat
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from featpipe import Model, backbones, extract, load_model, predict, train
from featpipe import data as archive
from featpipe.data import LabelTable
from featpipe.errors import ArchiveError, CacheError, ConfigError, ModelError
from featpipe.inference import Engine, Loader
from featpipe.prediction import Prediction, stream
from featpipe.runtime import Progress
from tests.support.logs import logged_warning
from tests.support.networks import count_passes

HOSTILE = ["new\nline", 'a "quoted", name', "comma,semi;colon", "🐝 émoji", "carriage\rreturn", "=1+1", " space ", "'"]


@pytest.fixture
def model(tiny: Any, make_folder: Any, tmp_path: Path) -> Model:
    return train(extract(make_folder(), backbone=tiny, cache=tmp_path / "cache")).attach(tiny)


@pytest.fixture
def photos(model: Model, tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "photos").rglob("*.jpg"))


@pytest.fixture
def forward(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counted once there is a model."""
    return count_passes(monkeypatch)


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def read_parquet(path: Path) -> list[dict[str, Any]]:
    return pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()


READERS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    ".csv": read_csv,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}


def packed(photos: list[Path], kind: str, place: Path) -> Path:
    """The images in an order that is not that of their names."""
    order = np.random.default_rng(1).permutation(len(photos))
    if kind == "folder":
        return photos[0].parent.parent
    path = place / f"packed.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as bundle:
            for i in order:
                bundle.write(photos[i], f"{i:02}.jpg")
    else:
        with tarfile.open(path, "w:gz" if kind.endswith("gz") else "w") as tar:
            for i in order:
                tar.add(photos[i], f"{i:02}.jpg")
    return path


def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes batches finish in another order than they began in."""
    read, pause = Loader._read, np.random.default_rng(0)

    def delayed(self: Loader, row: int, seconds: Any) -> Any:
        time.sleep(float(pause.uniform(0, 0.008)))
        return read(self, row, seconds)

    monkeypatch.setattr(Loader, "_read", delayed)


# -- order and agreement ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "tar", "tar.gz", "zip"])
def test_the_order_is_the_archive_s_with_any_number_of_workers(
    kind: str, model: Model, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowly(monkeypatch)
    place = packed(photos, kind, tmp_path)
    monkeypatch.setattr(Engine, "batch", 3)
    index = archive.index(place)
    with index.open() as reader:
        data = [reader.read(row) for row in range(len(index))]
    expected = model.predict_proba(data)
    for workers in (1, 5):
        found = list(stream(model, index, top=3, workers=workers))
        assert [p.id for p in found] == list(index.ids)
        assert np.array_equal([[dict(p.top)[name] for name in model.classes] for p in found], expected)
        assert [p.label for p in found] == model.predict(data).tolist()


@pytest.mark.parametrize("suffix", READERS)
def test_every_kind_of_file_agrees_with_the_model(
    suffix: str, model: Model, photos: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out" / f"predictions{suffix}"
    counts = predict(model, tmp_path / "photos", out, top=2)
    rows, probabilities = READERS[suffix](out), model.predict_proba(photos)
    assert counts == {"ok": 18}
    assert [row["id"] for row in rows] == [str(path.relative_to(tmp_path / "photos")) for path in photos]
    assert [row["label"] for row in rows] == model.predict(photos).tolist()
    assert [float(row["probability"]) for row in rows] == probabilities.max(axis=1).tolist()
    for row, values in zip(rows, probabilities, strict=True):
        top = row["top"]
        if suffix == ".csv":
            top = json.loads(top)
        if suffix == ".parquet":
            top = {pair["label"]: pair["probability"] for pair in top}
        best = np.argsort(-values)[:2]
        assert list(top) == [model.classes[i] for i in best]
        assert list(top.values()) == pytest.approx(values[best].tolist(), abs=1e-6)


@pytest.mark.parametrize("suffix", READERS)
def test_a_sample_that_cannot_be_read_keeps_its_row_and_says_why(
    suffix: str, model: Model, photos: list[Path], tmp_path: Path
) -> None:
    photos[3].write_bytes(b"")
    photos[4].write_bytes(photos[5].read_bytes()[:300])
    photos[9].write_bytes(b"no image")
    out = tmp_path / f"predictions{suffix}"
    with logged_warning("3 of 18 images have no prediction: 1 empty, 1 damaged, 1 unsupported"):
        counts = predict(model, tmp_path / "photos", out)
    rows = READERS[suffix](out)
    assert counts == {"ok": 15, "empty": 1, "damaged": 1, "unsupported": 1}
    bad = {row["id"]: row["status"] for row in rows if row["status"] != "ok"}
    names = [str(path.relative_to(tmp_path / "photos")) for path in photos]
    assert bad == {names[3]: "empty", names[4]: "damaged", names[9]: "unsupported"}
    assert [row["id"] for row in rows] == names
    for row in (rows[3], rows[4], rows[9]):
        assert not row["label"]
        assert not row["probability"]
    good = [i for i in range(18) if i not in (3, 4, 9)]
    assert [rows[i]["label"] for i in good] == model.predict([photos[i] for i in good]).tolist()


def test_an_archive_of_bad_images_alone_is_predicted(model: Model, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    for i in range(20):
        (tmp_path / "bad" / f"{i:02}.jpg").write_bytes(b"no image")
    found = list(stream(model, archive.index(tmp_path / "bad")))
    assert found == [Prediction(f"{i:02}.jpg", "unsupported") for i in range(20)]


def test_an_embedding_that_is_not_finite_is_a_status(model: Model, photos: list[Path]) -> None:
    network = model.backbone.network

    class Picky(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            values = network(x)
            return torch.where(x.mean((1, 2, 3))[:, None] > limit, torch.nan, values)

    brightness = [model.backbone.transform(torch.from_numpy(p)).mean() for p in pixels(photos)]
    limit = float(np.median(brightness))
    expected = model.predict(photos)
    model._backbone = backbones.load(Picky(), transform=model.backbone.transform.function)
    model._engine = None
    found = list(stream(model, archive.index(photos[0].parent.parent)))
    assert [p.status == "not-finite" for p in found] == [bool(b > limit) for b in brightness]
    assert [p.label for p in found if p.status == "ok"] == [
        label for label, b in zip(expected, brightness, strict=True) if b <= limit
    ]


def pixels(photos: list[Path]) -> Iterator[np.ndarray]:
    from featpipe.data import decode_image

    for path in photos:
        yield np.ascontiguousarray(decode_image(path.read_bytes()).transpose(2, 0, 1))


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", READERS)
def test_hostile_names_survive(suffix: str, model: Model, photos: list[Path], tmp_path: Path) -> None:
    place = tmp_path / "hostile.tar"
    with tarfile.open(place, "w") as tar:
        for name in HOSTILE:
            tar.add(photos[0], f"{name}.jpg")
    out = tmp_path / f"out{suffix}"
    predict(model, place, out)
    assert [row["id"] for row in READERS[suffix](out)] == [f"{name}.jpg" for name in HOSTILE]


@pytest.mark.parametrize("suffix", READERS)
def test_an_interrupted_prediction_leaves_the_old_file(
    suffix: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / f"out{suffix}"
    for before in (None, b"an older file"):
        if before is not None:
            out.write_bytes(before)
        for error in (KeyboardInterrupt(), RuntimeError("a bug")):

            def stop(_: Progress, error: BaseException = error) -> None:
                raise error

            with pytest.raises(type(error)):
                predict(model, tmp_path / "photos", out, progress=stop)
            assert (out.read_bytes() if out.exists() else None) == before
        assert list(tmp_path.glob(".*")) == []
    predict(model, tmp_path / "photos", out)
    assert len(READERS[suffix](out)) == 18


def test_a_full_disk_is_one_line_and_leaves_nothing(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def full(descriptor: int) -> None:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CacheError, match=r"out\.csv\.parts: cannot be written \(No space left on device\)"):
        predict(model, tmp_path / "photos", tmp_path / "out.csv")
    assert list(tmp_path.glob("*out*")) == []


def test_a_disk_that_is_full_in_the_end_leaves_the_finished_work(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forward: list[int]
) -> None:
    def full(path: Path, **_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("featpipe.prediction.writers.atomic_write", full)
        with pytest.raises(ArchiveError, match=r"out\.csv: cannot be written \(No space left on device\); choose"):
            predict(model, tmp_path / "photos", tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()
    assert sum(forward) == 18
    assert predict(model, tmp_path / "photos", tmp_path / "out.csv") == {"ok": 18}
    assert sum(forward) == 18


def test_places_and_settings_that_cannot_be_used_are_one_line(model: Model, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ConfigError, match=r"unknown kind of output file '\.cvs'; did you mean '\.csv'"):
        predict(model, photos, tmp_path / "out.cvs")
    for out in (tmp_path / "file" / "out.csv", tmp_path / "folder.csv"):
        with pytest.raises(ArchiveError, match="cannot be written"):
            predict(model, photos, out)
    for settings in ({"top": 0}, {"workers": 0}, {"workers": -1}):
        with pytest.raises(ConfigError, match="give a whole number of 1 or more"):
            predict(model, photos, **settings)
    with pytest.raises(ArchiveError, match="gone"):
        predict(model, tmp_path / "gone", tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_standard_output_gets_the_same_table(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predict(model, tmp_path / "photos", tmp_path / "out.csv")
    predict(model, tmp_path / "photos")
    assert capsys.readouterr().out.splitlines() == (tmp_path / "out.csv").read_text().splitlines()


def test_a_backbone_that_cannot_be_had_is_told_before_the_first_line(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_model(model.save(tmp_path / "m.model"))
    with pytest.raises(ModelError, match="not run by default"):
        predict(loaded, tmp_path / "photos")
    assert capsys.readouterr().out == ""


def test_a_reader_that_goes_away_is_no_other_error(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", buffering=1) as gone:
        monkeypatch.setattr("sys.stdout", gone)
        with pytest.raises(BrokenPipeError):
            predict(model, tmp_path / "photos")
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), write)


# -- memory ----------------------------------------------------------------------------------------------------------


def test_predictions_come_before_the_last_image_is_read(
    model: Model, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    original = Loader._read

    def counted(self: Loader, row: int, seconds: Any) -> Any:
        read.append(row)
        return original(self, row, seconds)

    monkeypatch.setattr(Loader, "_read", counted)
    many = tmp_path / "many.csv"
    many.write_text("path\n" + "\n".join(f"photos/{p.relative_to(tmp_path / 'photos')}" for p in photos * 30) + "\n")
    monkeypatch.setattr(Engine, "batch", 2)
    index = archive.index(many)
    predictions = stream(model, index, workers=2)
    first = next(predictions)
    time.sleep(0.3)  # the workers go ahead as far as they may
    assert first.id == index.ids[0]
    assert len(read) < 60
    predictions.close()
    assert len(read) < 80
    assert len(index) == 540


# -- other tasks -----------------------------------------------------------------------------------------------------


def table_of(photos: list[Path], place: Path, columns: str, values: Callable[[int], str]) -> LabelTable:
    lines = [f"photos/{p.relative_to(place / 'photos')},{values(i)}" for i, p in enumerate(photos)]
    (place / "labels.csv").write_text("\n".join([f"path,{columns}", *lines]) + "\n")
    return LabelTable(place / "labels.csv", label_column=columns)


@pytest.mark.parametrize("suffix", READERS)
@pytest.mark.parametrize("columns", ["height", "height,weight"])
def test_a_regression_has_a_column_for_each_target(
    columns: str, suffix: str, tiny: Any, photos: list[Path], tmp_path: Path
) -> None:
    labels = table_of(photos, tmp_path, columns, lambda i: ",".join([str(i + 0.5)] * (columns.count(",") + 1)))
    cache = extract(tmp_path / "photos", backbone=tiny, cache=tmp_path / "cache", labels=labels)
    model = train(cache, "linear", params={"epochs": 2}).attach(tiny)
    expected = model.predict(photos).reshape(18, -1)
    photos[7].write_bytes(b"no image")
    out = tmp_path / f"out{suffix}"
    with logged_warning("1 of 18"):
        predict(model, tmp_path / "photos", out)
    rows, names = READERS[suffix](out), [f"predicted_{name}" for name in columns.split(",")]
    assert list(rows[0]) == ["id", "status", *names, "novelty"]
    assert [rows[7][name] or None for name in names] == [None] * len(names)
    found = [[float(row[name]) for name in names] for i, row in enumerate(rows) if i != 7]
    assert found == np.delete(expected, 7, axis=0).tolist()


@pytest.mark.parametrize("suffix", READERS)
def test_several_labels_are_joined(suffix: str, tiny: Any, photos: list[Path], tmp_path: Path) -> None:
    labels = table_of(photos, tmp_path, "labels", lambda i: ["a;b", "b", "c"][i // 6])
    cache = extract(tmp_path / "photos", backbone=tiny, cache=tmp_path / "cache", labels=labels)
    model = train(cache, params={"C": 100}).attach(tiny)
    predict(model, tmp_path / "photos", tmp_path / f"out{suffix}")
    chosen = [";".join(np.array(model.classes)[row == 1]) for row in model.predict(photos)]
    assert [row["label"] for row in READERS[suffix](tmp_path / f"out{suffix}")] == chosen
    assert len(set(chosen)) > 2


def test_a_loaded_model_predicts_the_same(model: Model, tmp_path: Path) -> None:
    loaded = load_model(model.save(tmp_path / "m.model"), backbone=model.backbone)
    index = archive.index(tmp_path / "photos")
    assert list(stream(loaded, index)) == list(stream(model, index))


def test_progress_ends_with_all_samples(model: Model, tmp_path: Path) -> None:
    told: list[Progress] = []
    predict(model, tmp_path / "photos", tmp_path / "out.csv", progress=told.append)
    assert (told[-1].done, told[-1].total) == (18, 18)
    assert told[-1].stage == "predicting"
