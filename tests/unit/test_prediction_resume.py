"""Prediction of large archives: resuming, reusing finished files, several models at once, and caches."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from featpipe import FeatureCache, Model, backbones, clean, data, extract, load_model, predict, train
from featpipe.errors import ArchiveError, ConfigError, TimeLimitError
from featpipe.extraction import worker
from featpipe.extraction.worker import ExtractionWorker
from featpipe.inference import Engine
from featpipe.prediction import StatusCounts, provenance, stream
from featpipe.runtime import Deadline, Progress, parse_duration
from featpipe.storage import StagingArea
from tests.support.images import jpeg
from tests.support.logs import logged_warning
from tests.support.networks import Tiny, count_passes, tiny_transform

predict_module = import_module("featpipe.prediction.predict")

OLD_SECONDS = 1_000_000_000  # a time long ago, so that stamps are trusted


@pytest.fixture
def photos(make_folder: Any) -> Path:
    folder: Path = make_folder()
    for path in folder.rglob("*.jpg"):
        os.utime(path, (OLD_SECONDS, OLD_SECONDS))
    return folder


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models and the cache that they were trained on; the images equal those of the tests."""
    home = tmp_path_factory.mktemp("trained")
    for number, label in enumerate(("ape", "bee", "cow")):
        (home / "photos" / label).mkdir(parents=True)
        for i in range(6):
            (home / "photos" / label / f"{i:02}.jpg").write_bytes(jpeg(1000 * number + i))
    cache = extract(home / "photos", backbone=make_backbone(), out=home / "a.h5")
    train(cache, cv=2, params={"C": 1.0}).save(home / "first.model")
    train(cache, "knn").save(home / "other.model")
    return home


def make_backbone(seed: int = 0, **options: Any) -> Any:
    return backbones.load(Tiny(seed), transform=tiny_transform, **options)


@pytest.fixture
def model(trained_folder: Path, tiny: Any) -> Model:
    return load_model(trained_folder / "first.model", backbone=tiny)


@pytest.fixture
def other_model(trained_folder: Path, tiny: Any) -> Model:
    return load_model(trained_folder / "other.model", backbone=tiny)


@pytest.fixture
def forward_passes(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images of each forward pass after the model was loaded."""
    return count_passes(monkeypatch)


@pytest.fixture
def part_per_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use batches of two images, and commit a part after each."""
    monkeypatch.setattr(worker, "MAX_PART_SECONDS", 0)
    monkeypatch.setattr(Engine, "batch", 2)


class StopPrediction(Exception):
    pass


def raise_after_batches(batches: int, error: type[BaseException] = StopPrediction) -> Callable[[Progress], None]:
    """Make a progress callback that raises an error after a number of batches."""

    def raise_if_done(progress: Progress) -> None:
        if progress.done >= 2 * batches:
            raise error

    return raise_if_done


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def has_predictions(path: Path, model: Model, photos: Path, prefix: str = "") -> bool:
    """Whether a file has the predictions of the model, bit for bit, in the order of the folder."""
    files = sorted(photos.rglob("*.jpg"))
    rows = read_rows(path)
    assert [row["id"] for row in rows] == [str(file.relative_to(photos)) for file in files]
    expected = model.predict_proba(files)
    return [float(row[f"{prefix}probability"]) for row in rows] == expected.max(axis=1).tolist() and [
        row[f"{prefix}label"] for row in rows
    ] == model.predict(files).tolist()


# -- interrupts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [StopPrediction, KeyboardInterrupt])
def test_an_interrupted_prediction_resumes_and_gives_the_same_file(
    error: type[BaseException],
    model: Model,
    photos: Path,
    tmp_path: Path,
    part_per_batch: None,
    forward_passes: list[int],
) -> None:
    out = tmp_path / "p.csv"
    for batches in (2, 3):
        with pytest.raises(error):
            predict(model, photos, out, workers=1, progress=raise_after_batches(batches, error))
        assert not out.exists()
    n_finished = StagingArea(tmp_path / "p.csv.parts", "").count_recorded_rows()
    assert 4 <= n_finished < 18
    forward_passes.clear()
    assert predict(model, photos, out, workers=1) == {"ok": 18}
    assert sum(forward_passes) == 18 - n_finished
    assert has_predictions(out, model, photos)
    assert sorted(path.name for path in tmp_path.glob("*p.csv*")) == [".p.csv.made.json", "p.csv"]


def test_another_model_or_other_options_resume_from_the_same_parts(
    model: Model, other_model: Model, photos: Path, tmp_path: Path, part_per_batch: None, forward_passes: list[int]
) -> None:
    out = tmp_path / "p.csv"
    with pytest.raises(StopPrediction):
        predict(model, photos, out, workers=1, progress=raise_after_batches(5))
    n_finished = StagingArea(tmp_path / "p.csv.parts", "").count_recorded_rows()
    forward_passes.clear()
    predict(other_model, photos, out, workers=1, top=1)
    assert sum(forward_passes) == 18 - n_finished < 18
    assert has_predictions(out, other_model, photos)
    assert {len(json.loads(row["top"])) for row in read_rows(out)} == {1}


def test_another_backbone_does_not_resume_from_the_parts(
    model: Model, photos: Path, tmp_path: Path, part_per_batch: None, forward_passes: list[int]
) -> None:
    other_backbone = make_backbone(1)
    stranger = train(extract(photos, backbone=other_backbone, out=tmp_path / "t" / "b.h5"), params={"C": 1.0}).attach(
        other_backbone
    )
    with pytest.raises(StopPrediction):
        predict(model, photos, tmp_path / "p.csv", workers=1, progress=raise_after_batches(5))
    forward_passes.clear()
    predict(stranger, photos, tmp_path / "p.csv")
    assert sum(forward_passes) == 18
    assert has_predictions(tmp_path / "p.csv", stranger, photos)
    assert not (tmp_path / "p.csv.parts").exists()


def test_images_that_changed_in_the_meantime_are_embedded_again(
    model: Model, photos: Path, tmp_path: Path, part_per_batch: None
) -> None:
    with pytest.raises(StopPrediction):
        predict(model, photos, tmp_path / "p.csv", workers=1, progress=raise_after_batches(6))
    (photos / "ape" / "00.jpg").write_bytes(jpeg(77))
    (photos / "ape" / "01.jpg").rename(photos / "ape" / "00a.jpg")
    predict(model, photos, tmp_path / "p.csv")
    assert has_predictions(tmp_path / "p.csv", model, photos)


def test_repeated_predictions_with_a_time_limit_finish_eventually(
    model: Model, photos: Path, tmp_path: Path, part_per_batch: None, forward_passes: list[int]
) -> None:
    messages: list[str] = []
    while not (tmp_path / "p.csv").exists():
        try:
            predict(model, photos, tmp_path / "p.csv", workers=1, time_limit=1e-9)
        except TimeLimitError as error:
            messages.append(str(error))
        assert len(messages) < 9
    assert messages
    assert all("finished work is kept: run the same command again" in text for text in messages)
    assert has_predictions(tmp_path / "p.csv", model, photos)


def test_a_time_limit_stops_an_extraction_after_a_batch(
    tiny: Any, photos: Path, tmp_path: Path, part_per_batch: None
) -> None:
    settings = {"backbone": tiny, "out": tmp_path / "a.h5", "workers": 1, "batch": 2}
    with pytest.raises(TimeLimitError, match=r"the time limit of 0\.000001 seconds has passed"):
        extract(photos, time_limit="0.000001", **settings)
    assert 0 < extract(photos, time_limit="3h", **settings).manifest["embedded"] < 18


def test_a_time_limit_is_given_in_seconds_or_with_units() -> None:
    assert [parse_duration(limit) for limit in (5, "5", "0.5", "2m", "1.5h", "1d 2h")] == [5, 5, 0.5, 120, 5400, 93600]
    for invalid in ("soon", "", "3 weeks", "-1", 0, "1:30", "inf", "h"):
        with pytest.raises(ConfigError, match=r"time-limit is .*; give seconds, or a time such as 90m or 3h"):
            parse_duration(invalid)
    Deadline(None, started=0).check()
    with pytest.raises(ConfigError, match="time-limit"):
        predict(None, "photos", time_limit="soon")  # type: ignore[arg-type]


# -- finished files --------------------------------------------------------------------------------------------------


@pytest.fixture
def predict_again(model: Model, photos: Path, tmp_path: Path, forward_passes: list[int]) -> Callable[..., int]:
    """Return a function that predicts into a finished file and returns the number of embedded images."""
    predict(model, photos, tmp_path / "p.csv")

    def run(predicting_model: Model = model, **options: Any) -> int:
        forward_passes.clear()
        predict(predicting_model, photos, tmp_path / "p.csv", **options)
        return sum(forward_passes)

    return run


def test_a_current_file_is_not_rewritten(predict_again: Callable[..., int], tmp_path: Path) -> None:
    stat_before = (tmp_path / "p.csv").stat()
    assert predict_again() == 0
    assert os.path.samestat((tmp_path / "p.csv").stat(), stat_before)


def test_a_current_file_is_not_rewritten_for_the_saved_model(
    predict_again: Callable[..., int], model: Model, tmp_path: Path
) -> None:
    loaded = load_model(model.save(tmp_path / "m.model"), backbone=model.backbone)
    predict_again(loaded)  # the memory layout of a loaded model may differ from that of the trained one
    shutil.copy(tmp_path / "m.model", tmp_path / "renamed.model")
    assert predict_again(load_model(tmp_path / "renamed.model")) == 0


def test_images_with_new_times_and_the_same_bytes_are_not_predicted_again(
    predict_again: Callable[..., int], photos: Path, tmp_path: Path
) -> None:
    for path in photos.rglob("*.jpg"):
        os.utime(path, (OLD_SECONDS + 5, OLD_SECONDS + 5))
    receipt_before = json.loads(provenance.make_receipt_path(tmp_path / "p.csv").read_text())
    assert predict_again() == 0
    assert (
        json.loads(provenance.make_receipt_path(tmp_path / "p.csv").read_text())["stamps"] != receipt_before["stamps"]
    )
    assert predict_again(check_content=True) == 0


def test_images_that_changed_under_the_same_name_are_predicted_again(
    predict_again: Callable[..., int], model: Model, photos: Path, tmp_path: Path
) -> None:
    (photos / "ape" / "00.jpg").write_bytes(jpeg(77))
    assert predict_again() == 18
    assert has_predictions(tmp_path / "p.csv", model, photos)
    (photos / "ape" / "00.jpg").rename(photos / "ape" / "new.jpg")
    assert predict_again() == 18
    assert has_predictions(tmp_path / "p.csv", model, photos)


def test_images_that_change_without_a_new_modification_time_are_predicted_again(
    model: Model, photos: Path, tmp_path: Path, forward_passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = photos / "ape" / "00.jpg"
    monkeypatch.setattr("featpipe.prediction.provenance.time_ns", lambda: (OLD_SECONDS + 1) * 10**9)
    monkeypatch.setattr("featpipe.extraction.row_sources.time_ns", lambda: (OLD_SECONDS + 1) * 10**9)
    predict(model, photos, tmp_path / "p.csv")
    size = path.stat().st_size
    path.write_bytes((jpeg(77) + bytes(size))[:size])
    os.utime(path, (OLD_SECONDS, OLD_SECONDS))
    forward_passes.clear()
    predict(model, photos, tmp_path / "p.csv")
    assert sum(forward_passes) == 18


@pytest.mark.parametrize("options", [{"top": 2}, {"sets": 0.9}])
def test_other_options_rewrite_the_file(predict_again: Callable[..., int], options: dict[str, Any]) -> None:
    assert predict_again(**options) == 18
    assert predict_again(**options) == 0


def test_another_head_rewrites_the_file(
    predict_again: Callable[..., int], model: Model, photos: Path, trained_folder: Path, tmp_path: Path
) -> None:
    same_named_model = train(FeatureCache(trained_folder / "a.h5"), params={"C": 3.0}).attach(model.backbone)
    assert same_named_model.classes == model.classes
    assert predict_again(same_named_model) == 18
    assert has_predictions(tmp_path / "p.csv", same_named_model, photos)


def test_an_edited_file_or_a_missing_or_damaged_receipt_is_written_again(
    predict_again: Callable[..., int], model: Model, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "p.csv"
    file_bytes, receipt = out.read_bytes(), provenance.make_receipt_path(out)
    for damage in (
        lambda: out.write_bytes(file_bytes[:-9]),
        lambda: out.write_bytes(file_bytes.replace(b"ape", b"bee", 1)),
        receipt.unlink,
        lambda: receipt.write_bytes(receipt.read_bytes()[:50]),
        lambda: receipt.write_text("[" * 10000),
        lambda: receipt.write_text("[]"),
    ):
        damage()
        assert predict_again() == 18
        assert out.read_bytes() == file_bytes


def test_an_image_with_a_transient_status_is_read_again(
    model: Model, photos: Path, tmp_path: Path, forward_passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from featpipe.data import SampleReader
    from featpipe.errors import SampleError
    from featpipe.status import Status

    read = SampleReader.read

    def read_or_fail(self: SampleReader, row: int) -> bytes:
        if row == 4:
            raise SampleError("the network hangs", status=Status.UNREADABLE)
        return read(self, row)

    monkeypatch.setattr(SampleReader, "read", read_or_fail)
    with logged_warning("1 unreadable"):
        predict(model, photos, tmp_path / "p.csv")
    monkeypatch.setattr(SampleReader, "read", read)
    assert predict(model, photos, tmp_path / "p.csv") == {"ok": 18}


def test_parts_left_by_a_kill_after_publication_are_removed_by_the_next_run(
    predict_again: Callable[..., int], tmp_path: Path
) -> None:
    (tmp_path / "p.csv.parts").mkdir()
    (tmp_path / "p.csv.parts" / "lock").touch()
    assert predict_again() == 0
    assert not (tmp_path / "p.csv.parts").exists()


# -- caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_predicting_with_a_cache_writes_the_cache_of_an_extraction(
    storage: str, tiny: Any, photos: Path, tmp_path: Path
) -> None:
    reference_cache = extract(photos, backbone=tiny, out=tmp_path / "t" / "a.h5", storage=storage)
    model = train(reference_cache, params={"C": 1.0}).attach(tiny)
    predict(model, photos, tmp_path / "p.csv", cache=tmp_path / "c")
    (cache_path,) = (tmp_path / "c").glob("*.h5")
    cache = extract(photos, backbone=tiny, cache=tmp_path / "c", storage=storage)
    assert cache.path == cache_path
    assert cache.table().same_as(reference_cache.table())
    assert np.array_equal(cache.features(), reference_cache.features())
    expected = model.predict_proba_features(cache.X).max(axis=1)
    assert [float(row["probability"]) for row in read_rows(tmp_path / "p.csv")] == expected.tolist()


def test_another_model_on_cached_images_needs_no_forward_pass(
    model: Model, other_model: Model, photos: Path, tmp_path: Path, forward_passes: list[int]
) -> None:
    predict(model, photos, tmp_path / "p.csv", cache=tmp_path / "c")
    assert sum(forward_passes) == 18
    predict(other_model, photos, tmp_path / "q.csv", cache=tmp_path / "c")
    predict(model, photos, tmp_path / "p.jsonl", cache=tmp_path / "c")
    assert sum(forward_passes) == 18
    assert has_predictions(tmp_path / "p.csv", model, photos)
    assert has_predictions(tmp_path / "q.csv", other_model, photos)


def test_standard_output_with_a_cache_equals_the_file(
    model: Model, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict(model, photos, tmp_path / "p.csv")
    predict(model, photos, cache=tmp_path / "c")
    assert capsys.readouterr().out == (tmp_path / "p.csv").read_text()


def test_an_archive_without_readable_images_is_predicted_with_a_cache(model: Model, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"no image")
    with logged_warning("1 unsupported"):
        assert predict(model, tmp_path / "bad", tmp_path / "p.csv", cache=tmp_path / "c") == {"unsupported": 1}


# -- several models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["p.csv", "p.jsonl", "p.parquet", None])
def test_several_models_share_one_forward_pass(
    out: str | None,
    model: Model,
    other_model: Model,
    photos: Path,
    tmp_path: Path,
    forward_passes: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    predict(model, photos, out and tmp_path / out, also=[other_model])
    assert sum(forward_passes) == 18
    if out is None:
        (tmp_path / "p.csv").write_text(capsys.readouterr().out)
    rows = {
        "p.jsonl": lambda: [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()],
        "p.parquet": lambda: pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "p.parquet").to_pylist(),
    }.get(out or "", lambda: read_rows(tmp_path / "p.csv"))()
    names = ["label", "probability", "top", "novelty"]
    assert list(rows[0]) == ["id", "status", *names, *(f"other.{name}" for name in names)]
    files = sorted(photos.rglob("*.jpg"))
    for each_model, prefix in ((model, ""), (other_model, "other.")):
        assert [row[f"{prefix}label"] for row in rows] == each_model.predict(files).tolist()
        expected = each_model.predict_proba(files).max(axis=1)
        probabilities = [float(row[f"{prefix}probability"]) for row in rows]
        if torch.cpu._is_avx512_supported():
            assert probabilities == expected.tolist()
        else:  # on CPUs with AVX2 only, the last bit of an embedding depends on its batch
            np.testing.assert_allclose(probabilities, expected, rtol=1e-6)


def test_models_of_the_same_name_have_separate_columns(
    model: Model, photos: Path, trained_folder: Path, tmp_path: Path
) -> None:
    saved = load_model(model.save(tmp_path / "twin.model"))
    unsaved = train(FeatureCache(trained_folder / "a.h5"), params={"C": 1.0})
    predict(model, photos, tmp_path / "p.csv", also=[saved, saved, unsaved])
    labels = [name for name in read_rows(tmp_path / "p.csv")[0] if name.endswith("label")]
    assert labels == ["label", "twin.label", "twin#3.label", "model4.label"]


def test_a_model_of_other_embeddings_is_refused(model: Model, photos: Path, tmp_path: Path) -> None:
    other_backbone = make_backbone(1)
    stranger = train(extract(photos, backbone=other_backbone, out=tmp_path / "t" / "b.h5"), params={"C": 1.0})
    with pytest.raises(
        ConfigError, match=r"model 2: was trained on other embeddings than .*first.model \(backbone\.weights"
    ):
        predict(model, photos, tmp_path / "p.csv", also=[stranger])
    other_backbone = make_backbone(outputs=["conv:avg"])
    other_output_model = train(extract(photos, backbone=other_backbone, out=tmp_path / "t" / "c.h5"), params={"C": 1.0})
    with pytest.raises(ConfigError, match=r"'conv:avg', .*first.model on 'pooled'"):
        predict(model, photos, tmp_path / "p.csv", also=[other_output_model])
    assert not (tmp_path / "p.csv.parts").exists()


# -- limits ----------------------------------------------------------------------------------------------------------


def test_too_many_bad_images_stop_the_prediction_and_a_higher_limit_resumes(
    model: Model, photos: Path, tmp_path: Path, forward_passes: list[int], part_per_batch: None
) -> None:
    for name in ("04", "05"):
        (photos / "cow" / f"{name}.jpg").write_bytes(b"no image")
    with pytest.raises(ArchiveError, match="more than --max-bad 1 allows"):
        predict(model, photos, tmp_path / "p.csv", max_bad=1, workers=1)
    assert not (tmp_path / "p.csv").exists()
    with logged_warning("2 of 18"):
        assert predict(model, photos, tmp_path / "p.csv", max_bad="20%") == {"ok": 16, "unsupported": 2}
    assert sum(forward_passes) == 16
    with logged_warning("2 of 18"), pytest.raises(ArchiveError, match="more than --max-bad 1 allows"):
        predict(model, photos, tmp_path / "p.csv", max_bad=1)


@pytest.mark.parametrize("options", [{"max_bad": 1}, {"time_limit": "3h"}])
def test_standard_output_refuses_options_that_need_stored_work(
    model: Model, photos: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="requires --out or --cache"):
        predict(model, photos, **options)


def test_unknown_settings_suggest_the_nearest_match(model: Model, photos: Path) -> None:
    with pytest.raises(ConfigError, match="unknown setting 'tops'; did you mean 'top'"):
        predict(model, photos, tops=3)


def test_stream_refuses_settings_of_stored_work(model: Model, photos: Path) -> None:
    with pytest.raises(ConfigError, match="unknown setting 'cache'"):
        next(stream(model, data.index(photos), cache="cache"))


def test_clean_lists_and_removes_unfinished_predictions(
    model: Model, photos: Path, tmp_path: Path, part_per_batch: None
) -> None:
    with pytest.raises(StopPrediction):
        predict(model, photos, tmp_path / "p.csv", workers=1, progress=raise_after_batches(4))
    (abandoned,) = clean(tmp_path)
    assert (abandoned.kind, abandoned.path, abandoned.renews) == ("parts", tmp_path / "p.csv.parts", False)
    assert abandoned.rows >= 6
    assert [item.path for item in clean(tmp_path, yes=True)] == [abandoned.path]
    assert not (tmp_path / "p.csv.parts").exists()


def test_predicting_on_several_devices_writes_one_file(
    model: Model, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used_devices: list[str] = []

    def embed(worker: ExtractionWorker, devices: Any) -> None:
        used_devices.extend(map(str, devices))
        worker.task = replace(worker.task, config=replace(worker.task.config, device="cpu"))
        worker.run(worker.task.create_engine())

    monkeypatch.setattr("featpipe.extraction.run.multi_device.embed_on_devices", embed)
    model.device = "cpu,cpu"
    assert predict(model, photos, tmp_path / "p.csv") == {"ok": 18}
    assert used_devices == ["cpu", "cpu"]
    with pytest.raises(ConfigError, match="several devices requires --out or --cache"):
        predict(model, photos)


def test_predictions_are_computed_and_written_block_by_block(
    model: Model, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is bounded: neither all embeddings nor all predictions exist at once."""
    block_sizes: list[int] = []
    predict_proba = Model.predict_proba_features

    def record_block(self: Model, X: np.ndarray) -> np.ndarray:
        block_sizes.append(len(X))
        return predict_proba(self, X)

    def open_writer(path: Path | None, columns: Any) -> Any:
        writer_context = real_writer(path, columns)
        rows_written: list[int] = []

        class RecordingWriter:
            def __enter__(self) -> Callable[..., None]:
                real_write = writer_context.__enter__()

                def write_row(sample: Any) -> None:
                    rows_written.append(1)
                    assert (
                        sum(block_sizes) - len(rows_written) < 5
                    )  # a block is predicted only after the previous one is written
                    real_write(sample)

                return write_row

            def __exit__(self, *error: Any) -> Any:
                return writer_context.__exit__(*error)

        return RecordingWriter()

    monkeypatch.setattr(predict_module, "HEAD_BATCH_ROWS", 5)
    monkeypatch.setattr(Model, "predict_proba_features", record_block)
    real_writer = predict_module.select_writer(tmp_path / "p.csv")
    monkeypatch.setattr(predict_module, "select_writer", lambda out: open_writer)
    predict(model, photos, tmp_path / "p.csv")
    assert block_sizes == [5, 5, 5, 3]


def test_status_counts_are_a_table_in_a_notebook() -> None:
    html = StatusCounts({"ok": 12345, "<b>": 1})._repr_html_()
    assert "<td>12,345</td>" in html
    assert "&lt;b&gt;" in html
