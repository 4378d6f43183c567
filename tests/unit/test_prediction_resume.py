"""Predictions of large archives: gone on with, not made twice, several models at once, from a cache and into one."""

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
from featpipe.extraction.worker import ExtractionWorker, create_engine
from featpipe.inference import Engine
from featpipe.prediction import StatusCounts, provenance, stream
from featpipe.runtime import Deadline, Progress, parse_duration
from featpipe.storage import StagingArea
from tests.support.images import jpeg
from tests.support.logs import logged_warning
from tests.support.networks import Tiny, count_passes, tiny_transform

verb = import_module("featpipe.prediction.predict")

OLD_SECONDS = 1_000_000_000  # files that changed long ago: their times are to be trusted


@pytest.fixture
def photos(make_folder: Any) -> Path:
    folder: Path = make_folder()
    for path in folder.rglob("*.jpg"):
        os.utime(path, (OLD_SECONDS, OLD_SECONDS))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and the cache that they were trained on, of pictures like those of each test."""
    home = tmp_path_factory.mktemp("trained")
    for number, label in enumerate(("ape", "bee", "cow")):
        (home / "photos" / label).mkdir(parents=True)
        for i in range(6):
            (home / "photos" / label / f"{i:02}.jpg").write_bytes(jpeg(1000 * number + i))
    cache = extract(home / "photos", backbone=network(), out=home / "a.h5")
    train(cache, cv=2, params={"C": 1.0}).save(home / "first.model")
    train(cache, "knn").save(home / "other.model")
    return home


def network(seed: int = 0, **more: Any) -> Any:
    return backbones.load(Tiny(seed), transform=tiny_transform, **more)


@pytest.fixture
def model(trained: Path, tiny: Any) -> Model:
    return load_model(trained / "first.model", backbone=tiny)


@pytest.fixture
def other(trained: Path, tiny: Any) -> Model:
    return load_model(trained / "other.model", backbone=tiny)


@pytest.fixture
def forward(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counted once there is a model."""
    return count_passes(monkeypatch)


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of two, and a part after each."""
    monkeypatch.setattr(worker, "MAX_PART_SECONDS", 0)
    monkeypatch.setattr(Engine, "batch", 2)


class Stop(Exception):
    pass


def after(batches: int, error: type[BaseException] = Stop) -> Callable[[Progress], None]:
    """A listener that ends the work after so many batches."""

    def tell(progress: Progress) -> None:
        if progress.done >= 2 * batches:
            raise error

    return tell


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def is_of(path: Path, model: Model, photos: Path, prefix: str = "") -> bool:
    """Whether a file says what the model says, bit for bit, in the order of the folder."""
    files = sorted(photos.rglob("*.jpg"))
    found = rows(path)
    assert [row["id"] for row in found] == [str(file.relative_to(photos)) for file in files]
    expected = model.predict_proba(files)
    return [float(row[f"{prefix}probability"]) for row in found] == expected.max(axis=1).tolist() and [
        row[f"{prefix}label"] for row in found
    ] == model.predict(files).tolist()


# -- interrupted -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_what_is_interrupted_goes_on_and_ends_as_if_it_had_not_been(
    error: type[BaseException], model: Model, photos: Path, tmp_path: Path, in_parts: None, forward: list[int]
) -> None:
    out = tmp_path / "p.csv"
    for batches in (2, 3):
        with pytest.raises(error):
            predict(model, photos, out, workers=1, progress=after(batches, error))
        assert not out.exists()
    finished = StagingArea(tmp_path / "p.csv.parts", "").count_recorded_rows()
    assert 4 <= finished < 18
    forward.clear()
    assert predict(model, photos, out, workers=1) == {"ok": 18}
    assert sum(forward) == 18 - finished
    assert is_of(out, model, photos)
    assert sorted(path.name for path in tmp_path.glob("*p.csv*")) == [".p.csv.made.json", "p.csv"]


def test_another_model_and_other_options_go_on_from_the_same_work_and_do_not_mix(
    model: Model, other: Model, photos: Path, tmp_path: Path, in_parts: None, forward: list[int]
) -> None:
    out = tmp_path / "p.csv"
    with pytest.raises(Stop):
        predict(model, photos, out, workers=1, progress=after(5))
    finished = StagingArea(tmp_path / "p.csv.parts", "").count_recorded_rows()
    forward.clear()
    predict(other, photos, out, workers=1, top=1)
    assert sum(forward) == 18 - finished < 18
    assert is_of(out, other, photos)
    assert {len(json.loads(row["top"])) for row in rows(out)} == {1}


def test_another_network_does_not_see_it(
    model: Model, photos: Path, tmp_path: Path, in_parts: None, forward: list[int]
) -> None:
    net = network(1)
    stranger = train(extract(photos, backbone=net, out=tmp_path / "t" / "b.h5"), params={"C": 1.0}).attach(net)
    with pytest.raises(Stop):
        predict(model, photos, tmp_path / "p.csv", workers=1, progress=after(5))
    forward.clear()
    predict(stranger, photos, tmp_path / "p.csv")
    assert sum(forward) == 18
    assert is_of(tmp_path / "p.csv", stranger, photos)
    assert not (tmp_path / "p.csv.parts").exists()


def test_images_that_changed_meanwhile_are_embedded_anew(
    model: Model, photos: Path, tmp_path: Path, in_parts: None
) -> None:
    with pytest.raises(Stop):
        predict(model, photos, tmp_path / "p.csv", workers=1, progress=after(6))
    (photos / "ape" / "00.jpg").write_bytes(jpeg(77))
    (photos / "ape" / "01.jpg").rename(photos / "ape" / "00a.jpg")
    predict(model, photos, tmp_path / "p.csv")
    assert is_of(tmp_path / "p.csv", model, photos)


def test_a_time_limit_stops_after_a_batch_and_in_the_end_all_is_done(
    model: Model, photos: Path, tmp_path: Path, in_parts: None, forward: list[int]
) -> None:
    said: list[str] = []
    while not (tmp_path / "p.csv").exists():
        try:
            predict(model, photos, tmp_path / "p.csv", workers=1, time_limit=1e-9)
        except TimeLimitError as error:
            said.append(str(error))
        assert len(said) < 9
    assert said
    assert all("finished work is kept: run the same command again" in text for text in said)
    assert is_of(tmp_path / "p.csv", model, photos)


def test_a_time_limit_of_an_extraction_likewise(tiny: Any, photos: Path, tmp_path: Path, in_parts: None) -> None:
    given = {"backbone": tiny, "out": tmp_path / "a.h5", "workers": 1, "batch": 2}
    with pytest.raises(TimeLimitError, match=r"the time limit of 0\.000001 seconds has passed"):
        extract(photos, time_limit="0.000001", **given)
    assert 0 < extract(photos, time_limit="3h", **given).manifest["embedded"] < 18


def test_a_limit_is_seconds_or_a_time() -> None:
    assert [parse_duration(limit) for limit in (5, "5", "0.5", "2m", "1.5h", "1d 2h")] == [5, 5, 0.5, 120, 5400, 93600]
    for wrong in ("soon", "", "3 weeks", "-1", 0, "1:30", "inf", "h"):
        with pytest.raises(ConfigError, match=r"time-limit is .*; give seconds, or a time such as 90m or 3h"):
            parse_duration(wrong)
    Deadline(None, started=0).check()
    with pytest.raises(ConfigError, match="time-limit"):
        predict(None, "photos", time_limit="soon")  # type: ignore[arg-type]


# -- a second time ---------------------------------------------------------------------------------------------------


@pytest.fixture
def again(model: Model, photos: Path, tmp_path: Path, forward: list[int]) -> Callable[..., int]:
    """Predicts into a file that is finished, and says of how many images there was a forward pass."""
    predict(model, photos, tmp_path / "p.csv")

    def run(by: Model = model, **asked: Any) -> int:
        forward.clear()
        predict(by, photos, tmp_path / "p.csv", **asked)
        return sum(forward)

    return run


def test_what_is_finished_is_not_touched(again: Callable[..., int], tmp_path: Path) -> None:
    before = (tmp_path / "p.csv").stat()
    assert again() == 0
    assert os.path.samestat((tmp_path / "p.csv").stat(), before)


def test_nor_by_the_same_model_from_its_file(again: Callable[..., int], model: Model, tmp_path: Path) -> None:
    loaded = load_model(model.save(tmp_path / "m.model"), backbone=model.backbone)
    again(loaded)  # what is loaded may differ from what was trained in how it lies in memory
    shutil.copy(tmp_path / "m.model", tmp_path / "renamed.model")
    assert again(load_model(tmp_path / "renamed.model")) == 0


def test_images_of_the_same_bytes_are_the_same_wherever_and_whenever(
    again: Callable[..., int], photos: Path, tmp_path: Path
) -> None:
    for path in photos.rglob("*.jpg"):
        os.utime(path, (OLD_SECONDS + 5, OLD_SECONDS + 5))
    before = json.loads(provenance.receipt_path(tmp_path / "p.csv").read_text())
    assert again() == 0
    assert json.loads(provenance.receipt_path(tmp_path / "p.csv").read_text())["stamps"] != before["stamps"]
    assert again(check_content=True) == 0


def test_images_that_changed_under_the_same_name_are_predicted_again(
    again: Callable[..., int], model: Model, photos: Path, tmp_path: Path
) -> None:
    (photos / "ape" / "00.jpg").write_bytes(jpeg(77))
    assert again() == 18
    assert is_of(tmp_path / "p.csv", model, photos)
    (photos / "ape" / "00.jpg").rename(photos / "ape" / "new.jpg")
    assert again() == 18
    assert is_of(tmp_path / "p.csv", model, photos)


def test_images_that_change_while_their_time_stands_still_are_predicted_again(
    model: Model, photos: Path, tmp_path: Path, forward: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = photos / "ape" / "00.jpg"
    monkeypatch.setattr("featpipe.prediction.provenance.time_ns", lambda: (OLD_SECONDS + 1) * 10**9)
    monkeypatch.setattr("featpipe.extraction.row_sources.time_ns", lambda: (OLD_SECONDS + 1) * 10**9)
    predict(model, photos, tmp_path / "p.csv")
    size = path.stat().st_size
    path.write_bytes((jpeg(77) + bytes(size))[:size])
    os.utime(path, (OLD_SECONDS, OLD_SECONDS))
    forward.clear()
    predict(model, photos, tmp_path / "p.csv")
    assert sum(forward) == 18


@pytest.mark.parametrize("asked", [{"top": 2}, {"sets": 0.9}])
def test_other_options_are_another_file(again: Callable[..., int], asked: dict[str, Any]) -> None:
    assert again(**asked) == 18
    assert again(**asked) == 0


def test_another_head_is_another_file_whatever_it_is_called(
    again: Callable[..., int], model: Model, photos: Path, trained: Path, tmp_path: Path
) -> None:
    twin = train(FeatureCache(trained / "a.h5"), params={"C": 3.0}).attach(model.backbone)
    assert twin.classes == model.classes
    assert again(twin) == 18
    assert is_of(tmp_path / "p.csv", twin, photos)


def test_a_file_that_was_edited_or_whose_record_is_gone_or_damaged_is_made_anew(
    again: Callable[..., int], model: Model, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "p.csv"
    whole, record = out.read_bytes(), provenance.receipt_path(out)
    for damage in (
        lambda: out.write_bytes(whole[:-9]),
        lambda: out.write_bytes(whole.replace(b"ape", b"bee", 1)),
        record.unlink,
        lambda: record.write_bytes(record.read_bytes()[:50]),
        lambda: record.write_text("[" * 10000),
        lambda: record.write_text("[]"),
    ):
        damage()
        assert again() == 18
        assert out.read_bytes() == whole


def test_an_image_that_was_not_there_is_looked_for_again(
    model: Model, photos: Path, tmp_path: Path, forward: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from featpipe.data import SampleReader
    from featpipe.errors import SampleError
    from featpipe.status import Status

    read = SampleReader.read

    def shaky(self: SampleReader, row: int) -> bytes:
        if row == 4:
            raise SampleError("the network hangs", status=Status.UNREADABLE)
        return read(self, row)

    monkeypatch.setattr(SampleReader, "read", shaky)
    with logged_warning("1 unreadable"):
        predict(model, photos, tmp_path / "p.csv")
    monkeypatch.setattr(SampleReader, "read", read)
    assert predict(model, photos, tmp_path / "p.csv") == {"ok": 18}


def test_a_kill_between_the_file_and_the_end_leaves_nothing_for_long(again: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "p.csv.parts").mkdir()
    (tmp_path / "p.csv.parts" / "lock").touch()
    assert again() == 0
    assert not (tmp_path / "p.csv.parts").exists()


# -- caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_the_embeddings_on_the_way_are_the_cache_of_an_extraction(
    storage: str, tiny: Any, photos: Path, tmp_path: Path
) -> None:
    trained = extract(photos, backbone=tiny, out=tmp_path / "t" / "a.h5", storage=storage)
    model = train(trained, params={"C": 1.0}).attach(tiny)
    predict(model, photos, tmp_path / "p.csv", cache=tmp_path / "c")
    (made_here,) = (tmp_path / "c").glob("*.h5")
    cache = extract(photos, backbone=tiny, cache=tmp_path / "c", storage=storage)
    assert cache.path == made_here
    assert cache.table().same_as(trained.table())
    assert np.array_equal(cache.features(), trained.features())
    expected = model.predict_proba_features(cache.X).max(axis=1)
    assert [float(row["probability"]) for row in rows(tmp_path / "p.csv")] == expected.tolist()


def test_the_next_model_over_the_same_images_costs_nothing(
    model: Model, other: Model, photos: Path, tmp_path: Path, forward: list[int]
) -> None:
    predict(model, photos, tmp_path / "p.csv", cache=tmp_path / "c")
    assert sum(forward) == 18
    predict(other, photos, tmp_path / "q.csv", cache=tmp_path / "c")
    predict(model, photos, tmp_path / "p.jsonl", cache=tmp_path / "c")
    assert sum(forward) == 18
    assert is_of(tmp_path / "p.csv", model, photos)
    assert is_of(tmp_path / "q.csv", other, photos)


def test_standard_output_from_a_cache_is_the_same(
    model: Model, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict(model, photos, tmp_path / "p.csv")
    predict(model, photos, cache=tmp_path / "c")
    assert capsys.readouterr().out == (tmp_path / "p.csv").read_text()


def test_an_archive_of_bad_images_alone_has_a_cache_too(model: Model, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"no image")
    with logged_warning("1 unsupported"):
        assert predict(model, tmp_path / "bad", tmp_path / "p.csv", cache=tmp_path / "c") == {"unsupported": 1}


# -- several models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["p.csv", "p.jsonl", "p.parquet", None])
def test_several_models_share_one_forward_pass(
    out: str | None,
    model: Model,
    other: Model,
    photos: Path,
    tmp_path: Path,
    forward: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    predict(model, photos, out and tmp_path / out, also=[other])
    assert sum(forward) == 18
    if out is None:
        (tmp_path / "p.csv").write_text(capsys.readouterr().out)
    found = {
        "p.jsonl": lambda: [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()],
        "p.parquet": lambda: pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "p.parquet").to_pylist(),
    }.get(out or "", lambda: rows(tmp_path / "p.csv"))()
    names = ["label", "probability", "top", "novelty"]
    assert list(found[0]) == ["id", "status", *names, *(f"other.{name}" for name in names)]
    files = sorted(photos.rglob("*.jpg"))
    for one, prefix in ((model, ""), (other, "other.")):
        assert [row[f"{prefix}label"] for row in found] == one.predict(files).tolist()
        expected = one.predict_proba(files).max(axis=1)
        probabilities = [float(row[f"{prefix}probability"]) for row in found]
        if torch.cpu._is_avx512_supported():
            assert probabilities == expected.tolist()
        else:  # seen on a CPU with AVX2 alone: the last bit of an embedding depends on its batch
            np.testing.assert_allclose(probabilities, expected, rtol=1e-6)


def test_models_of_one_name_have_columns_of_their_own(
    model: Model, photos: Path, trained: Path, tmp_path: Path
) -> None:
    saved = load_model(model.save(tmp_path / "twin.model"))
    unsaved = train(FeatureCache(trained / "a.h5"), params={"C": 1.0})
    predict(model, photos, tmp_path / "p.csv", also=[saved, saved, unsaved])
    labels = [name for name in rows(tmp_path / "p.csv")[0] if name.endswith("label")]
    assert labels == ["label", "twin.label", "twin#3.label", "model4.label"]


def test_a_model_of_other_embeddings_is_refused_in_one_line(model: Model, photos: Path, tmp_path: Path) -> None:
    net = network(1)
    stranger = train(extract(photos, backbone=net, out=tmp_path / "t" / "b.h5"), params={"C": 1.0})
    with pytest.raises(
        ConfigError, match=r"model 2: was trained on other embeddings than .*first.model \(backbone\.weights"
    ):
        predict(model, photos, tmp_path / "p.csv", also=[stranger])
    net = network(outputs=["conv:avg"])
    elsewhere = train(extract(photos, backbone=net, out=tmp_path / "t" / "c.h5"), params={"C": 1.0})
    with pytest.raises(ConfigError, match=r"'conv:avg', .*first.model on 'pooled'"):
        predict(model, photos, tmp_path / "p.csv", also=[elsewhere])
    assert not (tmp_path / "p.csv.parts").exists()


# -- limits ----------------------------------------------------------------------------------------------------------


def test_too_many_bad_images_stop_the_work_and_a_higher_limit_goes_on(
    model: Model, photos: Path, tmp_path: Path, forward: list[int], in_parts: None
) -> None:
    for name in ("04", "05"):
        (photos / "cow" / f"{name}.jpg").write_bytes(b"no image")
    with pytest.raises(ArchiveError, match="more than --max-bad 1 allows"):
        predict(model, photos, tmp_path / "p.csv", max_bad=1, workers=1)
    assert not (tmp_path / "p.csv").exists()
    with logged_warning("2 of 18"):
        assert predict(model, photos, tmp_path / "p.csv", max_bad="20%") == {"ok": 16, "unsupported": 2}
    assert sum(forward) == 16
    with logged_warning("2 of 18"), pytest.raises(ArchiveError, match="more than --max-bad 1 allows"):
        predict(model, photos, tmp_path / "p.csv", max_bad=1)


@pytest.mark.parametrize("asked", [{"max_bad": 1}, {"time_limit": "3h"}])
def test_standard_output_is_no_place_for_finished_work(model: Model, photos: Path, asked: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="requires --out or --cache"):
        predict(model, photos, **asked)


def test_unknown_settings_are_answered_with_the_nearest(model: Model, photos: Path) -> None:
    with pytest.raises(ConfigError, match="unknown setting 'tops'; did you mean 'top'"):
        predict(model, photos, tops=3)


def test_what_is_told_as_it_is_made_has_no_place_for_finished_work_either(model: Model, photos: Path) -> None:
    with pytest.raises(ConfigError, match="unknown setting 'cache'"):
        next(stream(model, data.index(photos), cache="cache"))


def test_unfinished_predictions_are_found_and_removed_with_what_else_is_unfinished(
    model: Model, photos: Path, tmp_path: Path, in_parts: None
) -> None:
    with pytest.raises(Stop):
        predict(model, photos, tmp_path / "p.csv", workers=1, progress=after(4))
    (found,) = clean(tmp_path)
    assert (found.kind, found.path, found.renews) == ("parts", tmp_path / "p.csv.parts", False)
    assert found.rows >= 6
    assert [thing.path for thing in clean(tmp_path, yes=True)] == [found.path]
    assert not (tmp_path / "p.csv.parts").exists()


def test_several_devices_work_on_one_file(
    model: Model, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used_devices: list[str] = []

    def embed(worker: ExtractionWorker, devices: Any, rows: Any) -> None:
        used_devices.extend(map(str, devices))
        worker.config = replace(worker.config, device="cpu")
        worker.run(lambda: create_engine(worker.backbone, worker.config, len(worker.index)), rows)

    monkeypatch.setattr("featpipe.extraction.run.multi_device.embed_on_devices", embed)
    model.device = "cpu,cpu"
    assert predict(model, photos, tmp_path / "p.csv") == {"ok": 18}
    assert used_devices == ["cpu", "cpu"]
    with pytest.raises(ConfigError, match="several devices requires --out or --cache"):
        predict(model, photos)


def test_embeddings_are_answered_block_by_block(
    model: Model, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is flat: neither all embeddings nor all answers are ever there at once."""
    sizes: list[int] = []
    answer = Model.predict_proba_features

    def counted(self: Model, X: np.ndarray) -> np.ndarray:
        sizes.append(len(X))
        return answer(self, X)

    def lazily(path: Path | None, columns: Any) -> Any:
        write = original(path, columns)
        written: list[int] = []

        class Noted:
            def __enter__(self) -> Callable[..., None]:
                inner = write.__enter__()

                def one(sample: Any) -> None:
                    written.append(1)
                    assert sum(sizes) - len(written) < 5  # no block is answered before the one before it is written
                    inner(sample)

                return one

            def __exit__(self, *error: Any) -> Any:
                return write.__exit__(*error)

        return Noted()

    monkeypatch.setattr(verb, "HEAD_BATCH_ROWS", 5)
    monkeypatch.setattr(Model, "predict_proba_features", counted)
    original = verb.select_writer(tmp_path / "p.csv")
    monkeypatch.setattr(verb, "select_writer", lambda out: lazily)
    predict(model, photos, tmp_path / "p.csv")
    assert sizes == [5, 5, 5, 3]


def test_counts_are_a_table_in_a_notebook() -> None:
    shown = StatusCounts({"ok": 12345, "<b>": 1})._repr_html_()
    assert "<td>12,345</td>" in shown
    assert "&lt;b&gt;" in shown
