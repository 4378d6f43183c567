"""Encoded samples → transformed batches with row numbers, in parallel threads."""

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


def test_every_row_is_loaded_once_with_its_own_image(make_folder):
    index = archive.index(make_folder())
    batches = load_all(Loader(index, np.arange(len(index)), tiny_transform, 4))
    assert [row for batch in batches for row in batch.rows] == list(range(18))
    with index.open() as reader:
        for batch in batches:
            for position, tensor in zip(batch.positions, batch.images, strict=True):
                data = reader.read(batch.rows[position])
                assert batch.digests[position] == digest(data)
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


def test_batches_stay_full_despite_bad_images(make_folder):
    folder = make_folder(("ape",), 9)
    (folder / "ape" / "00.jpg").write_bytes(b"")
    index = archive.index(folder)
    first_batch, second_batch = load_all(Loader(index, np.arange(9), tiny_transform, 4))
    assert (len(first_batch.images), len(second_batch.images)) == (4, 4)
    assert (first_batch.rows, second_batch.rows) == ([0, 1, 2, 3, 4], [5, 6, 7, 8])


def test_a_file_removed_after_listing_is_missing(make_folder):
    folder = make_folder(("ape",), 2)
    index = archive.index(folder)
    (folder / "ape" / "01.jpg").unlink()
    (batch,) = load_all(Loader(index, np.arange(2), tiny_transform, 4))
    assert batch.status == [Status.OK, Status.MISSING]
    assert batch.digests[1] == b""


def test_rows_with_an_existing_embedding_are_not_decoded(make_folder):
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


def test_an_error_of_the_transform_sets_the_status_of_its_row():
    def refuse(_):
        raise SampleError("too long", status=Status.TOO_LARGE)

    (batch,) = load_all(Loader(SampleList([jpeg(1)]), np.arange(1), refuse, 2))
    assert batch.status == [Status.TOO_LARGE]


def test_large_images_in_several_threads_wait_for_each_other(monkeypatch):
    monkeypatch.setattr(decoding, "LARGE_IMAGE_BUDGET", MemoryBudget(1))
    lock, n_active, max_active = threading.Lock(), [0], [0]

    def shrink(tensor):
        with lock:
            n_active[0] += 1
            max_active[0] = max(max_active[0], n_active[0])
        time.sleep(0.01)
        with lock:
            n_active[0] -= 1
        return tensor[:, :8, :8]

    large = encode_jpeg(np.zeros((1200, 1200, 3), np.uint8))
    loader = Loader(SampleList([large] * 9), np.arange(9), shrink, 1)
    batches = list(run_in_threads(loader.batches, 4))
    assert sum(len(batch.images) for batch in batches) == 9
    assert max_active == [1]


def test_each_image_is_read_after_the_previous_one_is_decoded():
    events = []

    class RecordingList(SampleList):
        def read(self, row):
            events.append("read")
            return super().read(row)

    def record_transform(tensor):
        events.append("decoded")
        return tiny_transform(tensor)

    (batch,) = load_all(Loader(RecordingList([jpeg(n) for n in range(4)]), np.arange(4), record_transform, 8))
    assert len(batch.images) == 4
    assert events == ["read", "decoded"] * 4


def test_a_sequential_archive_is_read_ahead_by_few_bytes(make_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(featpipe.inference.loader, "MAX_READ_AHEAD_BYTES", 1)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(make_folder(), "photos")
    index = archive.index(tmp_path / "a.tar.gz")
    assert index.sequential
    batches = load_all(Loader(index, np.arange(len(index)), tiny_transform, 4))
    assert [len(batch.images) for batch in batches] == [4, 4, 4, 4, 2]
    assert [row for batch in batches for row in batch.rows] == list(range(18))


def test_an_exception_in_one_thread_is_raised_and_stops_the_others():
    before = threading.active_count()

    def work():
        yield 1
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        list(run_in_threads(work, 3))
    assert threading.active_count() == before


def test_a_thread_that_hangs_does_not_block_closing(monkeypatch):
    monkeypatch.setattr(featpipe.inference.loader, "STOP_TIMEOUT_SECONDS", 0.1)
    before, released, turns = threading.active_count(), threading.Event(), iter(range(2))

    def work():
        if next(turns):
            released.wait()
        yield "read"

    stream = run_in_threads(work, 2)
    assert next(stream) == "read"
    stream.close()
    assert threading.active_count() == before + 1
    released.set()
    while threading.active_count() > before:
        time.sleep(0.001)


def test_closing_the_stream_stops_its_threads_within_an_item():
    items = []

    def work():
        while True:
            items.append(1)
            time.sleep(0.001)
            yield 1

    before = threading.active_count()
    stream = run_in_threads(work, 2)
    next(stream)
    stream.close()
    assert threading.active_count() == before
    count = len(items)
    time.sleep(0.05)
    assert len(items) == count


def test_workers_do_not_run_far_ahead_of_a_slow_consumer():
    items = []

    def work():
        for i in range(1000):
            items.append(i)
            yield i

    stream = run_in_threads(work, 2, prefetch=3)
    next(stream)
    time.sleep(0.2)
    assert len(items) <= 2 * 3 + 2 + 2
    stream.close()


def test_an_invalid_item_is_named_by_its_position():
    with pytest.raises(ConfigError, match="image 1"):
        load_all(Loader(SampleList([jpeg(1), 7]), np.arange(2), tiny_transform, 2))


class SlowEngine:
    """Emulates an engine on a slow GPU: an embedding is the mean of the image, and images in memory are counted."""

    device = torch.device("cuda")
    name = "slow"

    def __init__(self, batch: int, seconds: float = 0.0) -> None:
        self.batch, self.workers, self.seconds = batch, 4, seconds
        self.alive = self.max_alive = 0
        self.batches: list[int] = []
        self._lock = threading.Lock()

    def transform(self, picture):
        embedding = picture.float().mean((1, 2))
        with self._lock:
            self.alive += 1
            self.max_alive = max(self.max_alive, self.alive)
        weakref.finalize(embedding, self._count_freed)
        return embedding

    fallback_transform = transform

    def _count_freed(self) -> None:
        with self._lock:
            self.alive -= 1

    collate = staticmethod(list)
    session = staticmethod(nullcontext)

    def enter_stream(self, workers: int) -> None:
        pass

    def submit(self, images):
        time.sleep(self.seconds)
        self.batches.append(len(images))
        embeddings = {"mean": torch.stack(list(images)).numpy()}
        return lambda: embeddings


def make_numbered_images(n: int) -> SampleList:
    """Make images whose pixel values are their row numbers."""
    return SampleList([np.full((2, 2, 3), row % 251, np.uint8) for row in range(n)])


@pytest.mark.parametrize(("batch", "workers"), [(64, 1), (64, 3), (64, 16), (8, 16), (256, 5)])
def test_at_most_three_batches_and_a_micro_batch_are_in_memory_for_any_number_of_cores(batch, workers):
    engine, n = SlowEngine(batch, 0.02), 10 * max(batch, workers) + 3
    loader = Loader(make_numbered_images(n), np.arange(n), engine.transform, engine.batch, collate=engine.collate)
    means = np.full(n, -1.0)
    with closing(loader), closing(embed_batches(loader, engine, workers)) as batches:
        for decoded, values in batches:
            means[np.array(decoded.rows)[decoded.positions]] = values["mean"][:, 0]
    assert np.array_equal(means, np.arange(n) % 251)
    assert engine.alive == 0
    largest_batch = max(batch, workers)
    # A thread may still hold the last image of its previous micro-batch.
    assert engine.max_alive <= 2 * largest_batch + batch + micro_batch_size(engine, workers) + workers
    assert max(engine.batches) <= batch
    assert sum(engine.batches) == n


@pytest.mark.parametrize("workers", [1, 4, 16, 600])
@pytest.mark.parametrize("batch", [1, 8, 32, 100, 512])
def test_micro_batches_are_small_and_fit_into_a_batch(batch, workers):
    size = micro_batch_size(SlowEngine(batch), workers)
    assert 1 <= size <= MAX_MICRO_BATCH
    assert size * workers <= max(batch, workers)
    assert size & (size - 1) == 0


def test_full_batches_are_merged_from_micro_batches():
    engine, n = SlowEngine(64), 64 * 5 + 1
    loader = Loader(make_numbered_images(n), np.arange(n), engine.transform, engine.batch, collate=engine.collate)
    with closing(loader):
        assert sum(len(batch.rows) for batch, _ in embed_batches(loader, engine, 2)) == n
    assert engine.batches[:4] == [64] * 4  # the last, smaller micro-batch may overtake the previous one
    assert sum(engine.batches) == n


def test_a_worker_that_waits_for_the_gpu_uses_the_fallback_transform_next(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(featpipe.inference.loader, "perf_counter", lambda: now[0])

    def make_transform(name, seconds):
        def transform(picture):
            now[0] += seconds
            return name

        return transform

    loader = Loader(make_numbered_images(10), np.arange(10), make_transform("partial", 1.0), 8)
    micro_batches, image_lists = loader.micro_batches(2, make_transform("full", 3.0)), []
    for delay in (0.9, 1.1, 2.9, 3.1, 0.0):
        image_lists.append(next(micro_batches).images)
        now[0] += delay
    assert image_lists == [["partial"] * 2, ["partial"] * 2, ["full"] * 2, ["partial"] * 2, ["full"] * 2]


def test_batches_follow_an_engine_that_halves_its_batch_size():
    class Halving(SlowEngine):
        def submit(self, images):
            if len(self.batches) == 2:
                self.batch = 16
            return super().submit(images)

    engine, n = Halving(64), 500
    features, status = embed_sample_list(make_numbered_images(n), engine, "mean")
    assert np.array_equal(features[:, 0], np.arange(n) % 251)
    assert not status.any()
    assert max(engine.batches[3:]) <= 16


def test_bad_rows_and_rows_with_an_embedding_keep_their_positions_in_merged_batches(make_folder):
    folder = make_folder(("ape",), 40)
    for number in (0, 3, 4, 21, 39):
        (folder / "ape" / f"{number:02}.jpg").write_bytes(jpeg(2)[:200])
    index = archive.index(folder)
    embedded_digests = {digest((folder / "ape" / f"{number:02}.jpg").read_bytes()) for number in (5, 6, 38)}
    engine = SlowEngine(8)
    loader = Loader(index, np.arange(40), engine.transform, 8, embedded_digests.__contains__, engine.collate)
    status, means = np.full(40, -1), np.full((40, 3), np.nan)
    seconds = 0.0
    with closing(loader):
        for batch, values in embed_batches(loader, engine, 3):
            assert len(batch.rows) == len(batch.digests) == len(batch.status)
            status[batch.rows] = batch.status
            if values:
                means[np.array(batch.rows)[batch.positions]] = values["mean"]
            seconds += batch.seconds.decoding
    damaged = np.isin(np.arange(40), (0, 3, 4, 21, 39))
    assert np.array_equal(status == Status.DAMAGED, damaged)
    assert np.array_equal(np.isnan(means[:, 0]), damaged | np.isin(np.arange(40), (5, 6, 38)))
    for row in np.flatnonzero(np.isfinite(means[:, 0])):
        picture = decode_image((folder / "ape" / f"{row:02}.jpg").read_bytes())
        assert np.allclose(means[row], picture.mean((0, 1)), rtol=1e-5)
    assert seconds > 0


def test_rows_with_existing_embeddings_need_no_forward_pass():
    engine, items = SlowEngine(4), SampleList([jpeg(1)] * 700)
    loader = Loader(items, np.arange(700), engine.transform, 4, lambda _: True, engine.collate)
    with closing(loader):
        batches = [batch for batch, values in embed_batches(loader, engine, 2) if not values]
    assert sum(len(batch.rows) for batch in batches) == 700
    assert len(batches) > 1  # so that progress and the time limit are checked in between
    assert engine.batches == []


def test_an_exception_of_the_engine_stops_the_workers():
    class Broken(SlowEngine):
        def submit(self, images):
            raise RuntimeError("broken")

    engine, before = Broken(8), threading.active_count()
    loader = Loader(make_numbered_images(100), np.arange(100), engine.transform, 8, collate=engine.collate)
    with (
        pytest.raises(RuntimeError, match="broken"),
        closing(loader),
        closing(embed_batches(loader, engine, 3)) as batches,
    ):
        list(batches)
    assert threading.active_count() == before
