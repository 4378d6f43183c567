"""Bytes → transformed batches with their row numbers."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from featpipe import archive, image
from featpipe.errors import ConfigError, SampleError
from featpipe.fingerprint import digest
from featpipe.loader import Loader, Pictures, spread
from featpipe.status import Status
from tests.conftest import jpeg, picture, tiny_transform


def load_all(loader: Loader) -> list:
    return list(loader.batches())


def test_every_row_comes_once_and_carries_its_own_picture(make_folder):
    index = archive.index(make_folder())
    batches = load_all(Loader(index, np.arange(len(index)), tiny_transform, 4))
    assert [row for batch in batches for row in batch.rows] == list(range(18))
    with index.open() as reader:
        for batch in batches:
            for place, tensor in zip(batch.places, batch.images, strict=True):
                data = reader.read(batch.rows[place])
                assert batch.digests[place] == digest(data)
                expected = tiny_transform(torch.from_numpy(image.decode(data)).permute(2, 0, 1))
                assert torch.equal(tensor, expected)


def test_a_damaged_image_keeps_its_row_and_does_not_shift_its_neighbours(make_folder):
    folder = make_folder(("ape",), 5)
    (folder / "ape" / "02.jpg").write_bytes(jpeg(2)[:200])
    index = archive.index(folder)
    (batch,) = load_all(Loader(index, np.arange(5), tiny_transform, 8))
    assert batch.status == [Status.OK, Status.OK, Status.DAMAGED, Status.OK, Status.OK]
    assert batch.places == [0, 1, 3, 4]
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
    (batch,) = load_all(Loader(index, np.arange(3), tiny_transform, 4, is_known=lambda _: True))
    assert batch.rows == [0, 1, 2]
    assert batch.images is None
    assert all(batch.digests)


def test_several_threads_share_the_rows_of_one_loader(make_folder):
    index = archive.index(make_folder())
    loader = Loader(index, np.arange(len(index)), tiny_transform, 2)
    rows = [row for batch in spread(loader.batches, 4) for row in batch.rows]
    assert sorted(rows) == list(range(18))


def test_paths_bytes_pillow_images_and_arrays_are_read_in_the_order_given(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg(1))
    gray = np.full((9, 7), 128, np.uint8)
    pictures = Pictures([path, jpeg(2), picture(3), gray, str(path)])
    (batch,) = load_all(Loader(pictures, np.arange(5), tiny_transform, 8))
    expected = [image.decode(jpeg(1)), image.decode(jpeg(2)), np.asarray(picture(3)), np.repeat(gray[..., None], 3, 2)]
    expected.append(expected[0])
    for tensor, array in zip(batch.images, expected, strict=True):
        assert torch.equal(tensor, tiny_transform(torch.from_numpy(array.copy()).permute(2, 0, 1)))


def test_a_transform_that_refuses_a_picture_gives_its_row_that_status():
    def refuse(_):
        raise SampleError("too long", status=Status.TOO_LARGE)

    (batch,) = load_all(Loader(Pictures([jpeg(1)]), np.arange(1), refuse, 2))
    assert batch.status == [Status.TOO_LARGE]


def test_a_failure_in_one_thread_is_raised_and_stops_the_others():
    before = threading.active_count()

    def work():
        yield 1
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        list(spread(work, 3))
    assert threading.active_count() == before


def test_closing_the_stream_stops_its_threads_within_an_item():
    made = []

    def work():
        while True:
            made.append(1)
            time.sleep(0.001)
            yield 1

    before = threading.active_count()
    stream = spread(work, 2)
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

    stream = spread(work, 2, ahead=3)
    next(stream)
    time.sleep(0.2)
    assert len(made) <= 2 * 3 + 2 + 2
    stream.close()


def test_something_that_is_no_image_is_named_by_its_place():
    with pytest.raises(ConfigError, match="image 1"):
        load_all(Loader(Pictures([jpeg(1), 7]), np.arange(2), tiny_transform, 2))
