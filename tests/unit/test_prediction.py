"""Prediction of archives: one row for every sample, in order; a file is complete or absent."""

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

HOSTILE_NAMES = [
    "new\nline",
    'a "quoted", name',
    "comma,semi;colon",
    "🐝 émoji",
    "carriage\rreturn",
    "=1+1",
    " space ",
    "'",
]


@pytest.fixture
def model(tiny: Any, make_folder: Any, tmp_path: Path) -> Model:
    return train(extract(make_folder(), backbone=tiny, cache=tmp_path / "cache"), tune=False).attach(tiny)


@pytest.fixture
def photos(model: Model, tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "photos").rglob("*.jpg"))


@pytest.fixture
def forward_passes(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images of each forward pass after the model was trained."""
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


def pack_images(photos: list[Path], kind: str, folder: Path) -> Path:
    """Pack images in an order that differs from that of their names."""
    order = np.random.default_rng(1).permutation(len(photos))
    if kind == "folder":
        return photos[0].parent.parent
    path = folder / f"packed.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for i in order:
                archive.write(photos[i], f"{i:02}.jpg")
    else:
        with tarfile.open(path, "w:gz" if kind.endswith("gz") else "w") as tar:
            for i in order:
                tar.add(photos[i], f"{i:02}.jpg")
    return path


def delay_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Delay reads randomly, so that batches finish in another order than they started."""
    read, pause = Loader._read, np.random.default_rng(0)

    def delayed(self: Loader, row: int, seconds: Any) -> Any:
        time.sleep(float(pause.uniform(0, 0.008)))
        return read(self, row, seconds)

    monkeypatch.setattr(Loader, "_read", delayed)


# -- order and agreement ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "tar", "tar.gz", "zip"])
def test_predictions_keep_the_order_of_the_archive_for_any_number_of_workers(
    kind: str, model: Model, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delay_reads(monkeypatch)
    packed_archive = pack_images(photos, kind, tmp_path)
    monkeypatch.setattr(Engine, "batch", 3)
    index = archive.index(packed_archive)
    with index.open() as reader:
        data = [reader.read(row) for row in range(len(index))]
    expected = model.predict_proba(data)
    for workers in (1, 5):
        predictions = list(stream(model, index, top=3, workers=workers))
        assert [p.id for p in predictions] == list(index.ids)
        assert np.array_equal([[dict(p.top)[name] for name in model.classes] for p in predictions], expected)
        assert [p.label for p in predictions] == model.predict(data).tolist()


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
def test_an_unreadable_sample_keeps_its_row_with_the_reason(
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
    failed = {row["id"]: row["status"] for row in rows if row["status"] != "ok"}
    names = [str(path.relative_to(tmp_path / "photos")) for path in photos]
    assert failed == {names[3]: "empty", names[4]: "damaged", names[9]: "unsupported"}
    assert [row["id"] for row in rows] == names
    for row in (rows[3], rows[4], rows[9]):
        assert not row["label"]
        assert not row["probability"]
    ok_rows = [i for i in range(18) if i not in (3, 4, 9)]
    assert [rows[i]["label"] for i in ok_rows] == model.predict([photos[i] for i in ok_rows]).tolist()


def test_an_archive_without_readable_images_is_predicted(model: Model, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    for i in range(20):
        (tmp_path / "bad" / f"{i:02}.jpg").write_bytes(b"no image")
    predictions = list(stream(model, archive.index(tmp_path / "bad")))
    assert predictions == [Prediction(f"{i:02}.jpg", "unsupported") for i in range(20)]


def test_an_embedding_that_is_not_finite_gives_a_status(model: Model, photos: list[Path]) -> None:
    network = model.backbone.network

    class Picky(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            values = network(x)
            return torch.where(x.mean((1, 2, 3))[:, None] > limit, torch.nan, values)

    brightness = [model.backbone.transform(torch.from_numpy(p)).mean() for p in iter_pixels(photos)]
    limit = float(np.median(brightness))
    expected = model.predict(photos)
    model._backbone = backbones.load(Picky(), transform=model.backbone.transform.function)
    model._engine = None
    predictions = list(stream(model, archive.index(photos[0].parent.parent)))
    assert [p.status == "not-finite" for p in predictions] == [bool(b > limit) for b in brightness]
    assert [p.label for p in predictions if p.status == "ok"] == [
        label for label, b in zip(expected, brightness, strict=True) if b <= limit
    ]


def iter_pixels(photos: list[Path]) -> Iterator[np.ndarray]:
    from featpipe.data import decode_image

    for path in photos:
        yield np.ascontiguousarray(decode_image(path.read_bytes()).transpose(2, 0, 1))


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", READERS)
def test_hostile_names_are_written_unchanged(suffix: str, model: Model, photos: list[Path], tmp_path: Path) -> None:
    archive_path = tmp_path / "hostile.tar"
    with tarfile.open(archive_path, "w") as tar:
        for name in HOSTILE_NAMES:
            tar.add(photos[0], f"{name}.jpg")
    out = tmp_path / f"out{suffix}"
    predict(model, archive_path, out)
    assert [row["id"] for row in READERS[suffix](out)] == [f"{name}.jpg" for name in HOSTILE_NAMES]


@pytest.mark.parametrize("suffix", READERS)
def test_an_interrupted_prediction_keeps_the_old_file(
    suffix: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / f"out{suffix}"
    for old_bytes in (None, b"an older file"):
        if old_bytes is not None:
            out.write_bytes(old_bytes)
        for error in (KeyboardInterrupt(), RuntimeError("a bug")):

            def raise_error(_: Progress, error: BaseException = error) -> None:
                raise error

            with pytest.raises(type(error)):
                predict(model, tmp_path / "photos", out, progress=raise_error)
            assert (out.read_bytes() if out.exists() else None) == old_bytes
        assert list(tmp_path.glob(".*")) == []
    predict(model, tmp_path / "photos", out)
    assert len(READERS[suffix](out)) == 18


def test_a_full_disk_is_an_error_in_one_line_and_leaves_no_file(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def raise_disk_full(descriptor: int) -> None:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", raise_disk_full)
    with pytest.raises(CacheError, match=r"out\.csv\.parts: cannot be written \(No space left on device\)"):
        predict(model, tmp_path / "photos", tmp_path / "out.csv")
    assert list(tmp_path.glob("*out*")) == []


def test_a_disk_that_is_full_at_the_end_keeps_the_finished_work(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forward_passes: list[int]
) -> None:
    def raise_disk_full(path: Path, **_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("featpipe.prediction.writers.atomic_write", raise_disk_full)
        with pytest.raises(ArchiveError, match=r"out\.csv: cannot be written \(No space left on device\); choose"):
            predict(model, tmp_path / "photos", tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()
    assert sum(forward_passes) == 18
    assert predict(model, tmp_path / "photos", tmp_path / "out.csv") == {"ok": 18}
    assert sum(forward_passes) == 18


def test_invalid_paths_and_settings_are_errors(model: Model, tmp_path: Path) -> None:
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


def test_an_unavailable_backbone_is_an_error_before_the_first_line_of_output(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_model(model.save(tmp_path / "m.model"))
    with pytest.raises(ModelError, match="not run by default"):
        predict(loaded, tmp_path / "photos")
    assert capsys.readouterr().out == ""


def test_a_closed_standard_output_raises_a_broken_pipe_error(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_descriptor, write_descriptor = os.pipe()
    os.close(read_descriptor)
    with open(write_descriptor, "w", buffering=1) as broken_pipe:
        monkeypatch.setattr("sys.stdout", broken_pipe)
        with pytest.raises(BrokenPipeError):
            predict(model, tmp_path / "photos")
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), write_descriptor)


# -- memory ----------------------------------------------------------------------------------------------------------


def test_predictions_are_streamed_before_the_last_image_is_read(
    model: Model, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_read = []
    read_row = Loader._read

    def record_and_read(self: Loader, row: int, seconds: Any) -> Any:
        rows_read.append(row)
        return read_row(self, row, seconds)

    monkeypatch.setattr(Loader, "_read", record_and_read)
    table = tmp_path / "many.csv"
    table.write_text("path\n" + "\n".join(f"photos/{p.relative_to(tmp_path / 'photos')}" for p in photos * 30) + "\n")
    monkeypatch.setattr(Engine, "batch", 2)
    index = archive.index(table)
    predictions = stream(model, index, workers=2)
    first_prediction = next(predictions)
    time.sleep(0.3)  # the workers read ahead as far as they may
    assert first_prediction.id == index.ids[0]
    assert len(rows_read) < 60
    predictions.close()
    assert len(rows_read) < 80
    assert len(index) == 540


# -- other tasks -----------------------------------------------------------------------------------------------------


def write_label_table(photos: list[Path], folder: Path, columns: str, values: Callable[[int], str]) -> LabelTable:
    lines = [f"photos/{p.relative_to(folder / 'photos')},{values(i)}" for i, p in enumerate(photos)]
    (folder / "labels.csv").write_text("\n".join([f"path,{columns}", *lines]) + "\n")
    return LabelTable(folder / "labels.csv", label_column=columns)


@pytest.mark.parametrize("suffix", READERS)
@pytest.mark.parametrize("columns", ["height", "height,weight"])
def test_a_regression_has_a_column_for_each_target(
    columns: str, suffix: str, tiny: Any, photos: list[Path], tmp_path: Path
) -> None:
    labels = write_label_table(photos, tmp_path, columns, lambda i: ",".join([str(i + 0.5)] * (columns.count(",") + 1)))
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
    predicted = [[float(row[name]) for name in names] for i, row in enumerate(rows) if i != 7]
    assert predicted == np.delete(expected, 7, axis=0).tolist()


@pytest.mark.parametrize("suffix", READERS)
def test_several_labels_are_joined_by_semicolons(suffix: str, tiny: Any, photos: list[Path], tmp_path: Path) -> None:
    labels = write_label_table(photos, tmp_path, "labels", lambda i: ["a;b", "b", "c"][i // 6])
    cache = extract(tmp_path / "photos", backbone=tiny, cache=tmp_path / "cache", labels=labels)
    model = train(cache, params={"C": 100}).attach(tiny)
    predict(model, tmp_path / "photos", tmp_path / f"out{suffix}")
    expected = [";".join(np.array(model.classes)[row == 1]) for row in model.predict(photos)]
    assert [row["label"] for row in READERS[suffix](tmp_path / f"out{suffix}")] == expected
    assert len(set(expected)) > 2


def test_a_loaded_model_predicts_the_same(model: Model, tmp_path: Path) -> None:
    loaded = load_model(model.save(tmp_path / "m.model"), backbone=model.backbone)
    index = archive.index(tmp_path / "photos")
    assert list(stream(loaded, index)) == list(stream(model, index))


def test_progress_ends_with_all_samples(model: Model, tmp_path: Path) -> None:
    progress_calls: list[Progress] = []
    predict(model, tmp_path / "photos", tmp_path / "out.csv", progress=progress_calls.append)
    assert (progress_calls[-1].done, progress_calls[-1].total) == (18, 18)
    assert progress_calls[-1].stage == "predicting"
