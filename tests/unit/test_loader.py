"""Bytes → transformed batches with their row numbers."""

from __future__ import annotations

import tarfile
import threading
import time
import weakref
from contextlib import closing, nullcontext

import numpy as np
import pytest
import torch

import featpipe.inference.loader
from featpipe import data as archive
from featpipe.data import decode_image, encode_jpeg
from featpipe.data import jpeg as decoding
from featpipe.errors import ConfigError, SampleError
from featpipe.inference import (
    MAX_MICRO_BATCH,
    Loader,
    SampleList,
    embed_batches,
    embed_sample_list,
    micro_batch_size,
    run_in_threads,
)
from featpipe.runtime import MemoryBudget
from featpipe.status import Status
from featpipe.storage import digest
from tests.support.images import jpeg, picture
from tests.support.networks import tiny_transform


def load_all(loader: Loader) -> list:
    return list(loader.batches())


def test_every_row_comes_once_and_carries_its_own_picture(make_folder):
    index = archive.index(make_folder())
    batches = load_all(Loader(index, np.arange(len(index)), tiny_transform, 4))
    assert [row for batch in batches for row in batch.rows] == list(range(18))
    with index.open() as reader:
        for batch in batches:
            for place, tensor in zip(batch.positions, batch.images, strict=True):
                data = reader.read(batch.rows[place])
                assert batch.digests[place] == digest(data)
                expected = tiny_transform(torch.from_numpy(decode_image(data)).permute(2, 0, 1))
                assert torch.equal(tensor, expected)


def test_a_damaged_image_keeps_its_row_and_does_not_shift_its_neighbours(make_folder):
    folder = make_folder(("ape",), 5)
    (folder / "ape" / "02.jpg").write_bytes(jpeg(2)[:200])
    index = archive.index(folder)
    (batch,) = load_all(Loader(index, np.arange(5), tiny_transform, 8))
    assert batch.status == [Status.OK, Status.OK, Status.DAMAGED, Status.OK, Status.OK]
    assert batch.positions == [0, 1, 3, 4]
    assert len(batch.images) == 4


def test_bad_images_are_made_up_for_so_that_batches_stay_full(make_folder):
    folder = make_folder(("ape",), 9)
    (folder / "ape" / "00.jpg").write_bytes(b"")
    index = archive.index(folder)
    first, second = load_all(Loader(index, np.arange(9), tiny_transform, 4))
    assert (len(first.images), len(second.images)) == (4, 4)
    assert (first.rows, second.rows) == ([0, 1, 2, 3, 4], [5, 6, 7, 8])


def test_a_file_that_vanished_after_listing_is_missing(make_folder):
    folder = make_folder(("ape",), 2)
    index = archive.index(folder)
    (folder / "ape" / "01.jpg").unlink()
    (batch,) = load_all(Loader(index, np.arange(2), tiny_transform, 4))
    assert batch.status == [Status.OK, Status.MISSING]
    assert batch.digests[1] == b""


def test_known_bytes_are_not_decoded(make_folder):
    index = archive.index(make_folder(("ape",), 3))
    (batch,) = load_all(Loader(index, np.arange(3), tiny_transform, 4, has_embedding=lambda _: True))
    assert batch.rows == [0, 1, 2]
    assert batch.images is None
    assert all(batch.digests)


def test_several_threads_share_the_rows_of_one_loader(make_folder):
    index = archive.index(make_folder())
    loader = Loader(index, np.arange(len(index)), tiny_transform, 2)
    rows = [row for batch in run_in_threads(loader.batches, 4) for row in batch.rows]
    assert sorted(rows) == list(range(18))


def test_paths_bytes_pillow_images_and_arrays_are_read_in_the_order_given(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg(1))
    gray = np.full((9, 7), 128, np.uint8)
    pictures = SampleList([path, jpeg(2), picture(3), gray, str(path)])
    (batch,) = load_all(Loader(pictures, np.arange(5), tiny_transform, 8))
    expected = [decode_image(jpeg(1)), decode_image(jpeg(2)), np.asarray(picture(3)), np.repeat(gray[..., None], 3, 2)]
    expected.append(expected[0])
    for tensor, array in zip(batch.images, expected, strict=True):
        assert torch.equal(tensor, tiny_transform(torch.from_numpy(array.copy()).permute(2, 0, 1)))


def test_a_transform_that_refuses_a_picture_gives_its_row_that_status():
    def refuse(_):
        raise SampleError("too long", status=Status.TOO_LARGE)

    (batch,) = load_all(Loader(SampleList([jpeg(1)]), np.arange(1), refuse, 2))
    assert batch.status == [Status.TOO_LARGE]


def test_large_pictures_of_several_threads_wait_for_each_other(monkeypatch):
    monkeypatch.setattr(decoding, "LARGE_IMAGE_BUDGET", MemoryBudget(1))
    lock, together, most = threading.Lock(), [0], [0]

    def shrink(tensor):
        with lock:
            together[0] += 1
            most[0] = max(most[0], together[0])
        time.sleep(0.01)
        with lock:
            together[0] -= 1
        return tensor[:, :8, :8]

    large = encode_jpeg(np.zeros((1200, 1200, 3), np.uint8))
    loader = Loader(SampleList([large] * 9), np.arange(9), shrink, 1)
    batches = list(run_in_threads(loader.batches, 4))
    assert sum(len(batch.images) for batch in batches) == 9
    assert most == [1]


def test_an_image_is_read_when_the_one_before_it_is_decoded():
    told = []

    class Telling(SampleList):
        def read(self, row):
            told.append("read")
            return super().read(row)

    def tell(tensor):
        told.append("decoded")
        return tiny_transform(tensor)

    (batch,) = load_all(Loader(Telling([jpeg(n) for n in range(4)]), np.arange(4), tell, 8))
    assert len(batch.images) == 4
    assert told == ["read", "decoded"] * 4


def test_what_is_read_front_to_back_is_read_ahead_by_few_bytes(make_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(featpipe.inference.loader, "MAX_READ_AHEAD_BYTES", 1)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(make_folder(), "photos")
    index = archive.index(tmp_path / "a.tar.gz")
    assert index.sequential
    batches = load_all(Loader(index, np.arange(len(index)), tiny_transform, 4))
    assert [len(batch.images) for batch in batches] == [4, 4, 4, 4, 2]
    assert [row for batch in batches for row in batch.rows] == list(range(18))


def test_a_failure_in_one_thread_is_raised_and_stops_the_others():
    before = threading.active_count()

    def work():
        yield 1
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        list(run_in_threads(work, 3))
    assert threading.active_count() == before


def test_a_thread_that_hangs_does_not_keep_the_others_work(monkeypatch):
    monkeypatch.setattr(featpipe.inference.loader, "STOP_TIMEOUT_SECONDS", 0.1)
    before, goes_on, turns = threading.active_count(), threading.Event(), iter(range(2))

    def work():
        if next(turns):
            goes_on.wait()
        yield "read"

    stream = run_in_threads(work, 2)
    assert next(stream) == "read"
    stream.close()
    assert threading.active_count() == before + 1
    goes_on.set()
    while threading.active_count() > before:
        time.sleep(0.001)


def test_closing_the_stream_stops_its_threads_within_an_item():
    made = []

    def work():
        while True:
            made.append(1)
            time.sleep(0.001)
            yield 1

    before = threading.active_count()
    stream = run_in_threads(work, 2)
    next(stream)
    stream.close()
    assert threading.active_count() == before
    count = len(made)
    time.sleep(0.05)
    assert len(made) == count


def test_workers_do_not_run_far_ahead_of_a_slow_consumer():
    made = []

    def work():
        for i in range(1000):
            made.append(i)
            yield i

    stream = run_in_threads(work, 2, prefetch=3)
    next(stream)
    time.sleep(0.2)
    assert len(made) <= 2 * 3 + 2 + 2
    stream.close()


def test_something_that_is_no_image_is_named_by_its_place():
    with pytest.raises(ConfigError, match="image 1"):
        load_all(Loader(SampleList([jpeg(1), 7]), np.arange(2), tiny_transform, 2))


class Slow:
    """As an engine on a GPU that cannot keep up: a picture's embedding is its mean, and its pictures are counted."""

    device = torch.device("cuda")
    name = "slow"

    def __init__(self, batch: int, seconds: float = 0.0) -> None:
        self.batch, self.workers, self.seconds = batch, 4, seconds
        self.alive = self.most = 0
        self.batches: list[int] = []
        self._lock = threading.Lock()

    def transform(self, picture):
        made = picture.float().mean((1, 2))
        with self._lock:
            self.alive += 1
            self.most = max(self.most, self.alive)
        weakref.finalize(made, self._gone)
        return made

    fallback_transform = transform

    def _gone(self) -> None:
        with self._lock:
            self.alive -= 1

    collate = staticmethod(list)
    session = staticmethod(nullcontext)

    def enter_stream(self, workers: int) -> None:
        pass

    def submit(self, images):
        time.sleep(self.seconds)
        self.batches.append(len(images))
        answer = {"mean": torch.stack(list(images)).numpy()}
        return lambda: answer


def numbered(n: int) -> SampleList:
    """Pictures that tell their row."""
    return SampleList([np.full((2, 2, 3), row % 251, np.uint8) for row in range(n)])


@pytest.mark.parametrize(("batch", "workers"), [(64, 1), (64, 3), (64, 16), (8, 16), (256, 5)])
def test_three_batches_and_a_piece_are_in_memory_for_a_gpu_however_many_cores_there_are(batch, workers):
    engine, n = Slow(batch, 0.02), 10 * max(batch, workers) + 3
    loader = Loader(numbered(n), np.arange(n), engine.transform, engine.batch, collate=engine.collate)
    found = np.full(n, -1.0)
    with closing(loader), closing(embed_batches(loader, engine, workers)) as batches:
        for made, values in batches:
            found[np.array(made.rows)[made.positions]] = values["mean"][:, 0]
    assert np.array_equal(found, np.arange(n) % 251)
    assert engine.alive == 0
    held = max(batch, workers)
    # A thread that has just handed on a piece may hold its last picture until it has the next one.
    assert engine.most <= 2 * held + batch + micro_batch_size(engine, workers) + workers
    assert max(engine.batches) <= batch
    assert sum(engine.batches) == n


@pytest.mark.parametrize("workers", [1, 4, 16, 600])
@pytest.mark.parametrize("batch", [1, 8, 32, 100, 512])
def test_pieces_are_small_and_fit_into_a_batch(batch, workers):
    piece = micro_batch_size(Slow(batch), workers)
    assert 1 <= piece <= MAX_MICRO_BATCH
    assert piece * workers <= max(batch, workers)
    assert piece & (piece - 1) == 0


def test_full_batches_are_joined_of_pieces_while_there_are_enough_pictures():
    engine, n = Slow(64), 64 * 5 + 1
    loader = Loader(numbered(n), np.arange(n), engine.transform, engine.batch, collate=engine.collate)
    with closing(loader):
        assert sum(len(made.rows) for made, _ in embed_batches(loader, engine, 2)) == n
    assert engine.batches[:4] == [64] * 4  # the last, short piece may overtake the one before it
    assert sum(engine.batches) == n


def test_who_would_wait_for_a_gpu_does_more_of_the_work_the_next_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(featpipe.inference.loader, "perf_counter", lambda: now[0])

    def taking(name, seconds):
        def transform(picture):
            now[0] += seconds
            return name

        return transform

    loader = Loader(numbered(10), np.arange(10), taking("little", 1.0), 8)
    pieces, found = loader.micro_batches(2, taking("all", 3.0)), []
    for late in (0.9, 1.1, 2.9, 3.1, 0.0):
        found.append(next(pieces).images)
        now[0] += late
    assert found == [["little"] * 2, ["little"] * 2, ["all"] * 2, ["little"] * 2, ["all"] * 2]


def test_an_engine_whose_batch_was_halved_goes_on_with_what_it_can_take():
    class Halving(Slow):
        def submit(self, images):
            if len(self.batches) == 2:
                self.batch = 16
            return super().submit(images)

    engine, n = Halving(64), 500
    features, status = embed_sample_list(numbered(n), engine, "mean")
    assert np.array_equal(features[:, 0], np.arange(n) % 251)
    assert not status.any()
    assert max(engine.batches[3:]) <= 16


def test_rows_without_a_picture_and_rows_that_are_known_keep_their_places_among_joined_ones(make_folder):
    folder = make_folder(("ape",), 40)
    for number in (0, 3, 4, 21, 39):
        (folder / "ape" / f"{number:02}.jpg").write_bytes(jpeg(2)[:200])
    index = archive.index(folder)
    known = {digest((folder / "ape" / f"{number:02}.jpg").read_bytes()) for number in (5, 6, 38)}
    engine = Slow(8)
    loader = Loader(index, np.arange(40), engine.transform, 8, known.__contains__, engine.collate)
    status, found = np.full(40, -1), np.full((40, 3), np.nan)
    seconds = 0.0
    with closing(loader):
        for batch, values in embed_batches(loader, engine, 3):
            assert len(batch.rows) == len(batch.digests) == len(batch.status)
            status[batch.rows] = batch.status
            if values:
                found[np.array(batch.rows)[batch.positions]] = values["mean"]
            seconds += batch.seconds.decoding
    damaged = np.isin(np.arange(40), (0, 3, 4, 21, 39))
    assert np.array_equal(status == Status.DAMAGED, damaged)
    assert np.array_equal(np.isnan(found[:, 0]), damaged | np.isin(np.arange(40), (5, 6, 38)))
    for row in np.flatnonzero(np.isfinite(found[:, 0])):
        picture = decode_image((folder / "ape" / f"{row:02}.jpg").read_bytes())
        assert np.allclose(found[row], picture.mean((0, 1)), rtol=1e-5)
    assert seconds > 0


def test_nothing_but_known_rows_is_handed_on_without_a_forward_pass():
    engine, items = Slow(4), SampleList([jpeg(1)] * 700)
    loader = Loader(items, np.arange(700), engine.transform, 4, lambda _: True, engine.collate)
    with closing(loader):
        batches = [batch for batch, values in embed_batches(loader, engine, 2) if not values]
    assert sum(len(batch.rows) for batch in batches) == 700
    assert len(batches) > 1  # progress is told, and a deadline looked at, meanwhile
    assert engine.batches == []


def test_a_failure_of_the_engine_stops_the_workers():
    class Broken(Slow):
        def submit(self, images):
            raise RuntimeError("broken")

    engine, before = Broken(8), threading.active_count()
    loader = Loader(numbered(100), np.arange(100), engine.transform, 8, collate=engine.collate)
    with (
        pytest.raises(RuntimeError, match="broken"),
        closing(loader),
        closing(embed_batches(loader, engine, 3)) as batches,
    ):
        list(batches)
    assert threading.active_count() == before
