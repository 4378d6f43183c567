"""Every bit is compared with what Pillow makes of the same bytes."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from featpipe.data import ImageLimits, decode_image, encode_png, resize_image
from featpipe.data import jpeg as decoding
from featpipe.errors import SampleError
from featpipe.status import Status

PICTURE = np.random.default_rng(0).integers(0, 256, (41, 67, 3), dtype=np.uint8)


def jpeg(picture: NDArray[np.uint8], mode: str = "RGB", **options: object) -> bytes:
    file = BytesIO()
    Image.fromarray(picture).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return jpeg(PICTURE, exif=exif)


@pytest.fixture
def without_torchvision(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("torchvision was used")

    decoding.is_torchvision_exact()
    monkeypatch.setattr(torch.ops.image, "decode_jpeg", refuse)


@pytest.fixture
def asked_torchvision(monkeypatch):
    """The sizes of the pictures that torchvision was asked for."""
    decoding.is_torchvision_exact()
    sizes, decode = [], torch.ops.image.decode_jpeg

    def note(*given, **options):
        pixels = decode(*given, **options)
        sizes.append(tuple(pixels.shape[1:]))
        return pixels

    monkeypatch.setattr(torch.ops.image, "decode_jpeg", note)
    return sizes


@settings(max_examples=80, deadline=None)
@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    seed=st.integers(0, 2**32),
    coarse=st.booleans(),
    quality=st.integers(1, 100),
    subsampling=st.integers(0, 2),
    progressive=st.booleans(),
)
def test_the_pixels_of_any_jpeg_are_pillows(size, seed, coarse, quality, subsampling, progressive):
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, (*((3, 4) if coarse else size), 3), dtype=np.uint8)
    picture = resize_image(picture, *size, "bicubic") if coarse else picture
    data = jpeg(picture, quality=quality, subsampling=subsampling, progressive=progressive)
    found = decoding.decode_with_torchvision(data)
    np.testing.assert_array_equal(found, decode_image(data))
    assert found.flags.c_contiguous
    assert found.flags.writeable


@pytest.mark.parametrize("orientation", range(10))
def test_it_is_turned_upright(orientation, asked_torchvision):
    np.testing.assert_array_equal(
        decoding.decode_with_torchvision(turned(orientation)), decode_image(turned(orientation))
    )
    assert asked_torchvision == [PICTURE.shape[:2]]


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_what_is_no_colour_jpeg_is_pillows_affair(mode, without_torchvision):
    data = jpeg(PICTURE, mode)
    np.testing.assert_array_equal(decoding.decode_with_torchvision(data), decode_image(data))
    np.testing.assert_array_equal(decoding.decode_with_torchvision(encode_png(PICTURE)), PICTURE)


def test_a_picture_with_too_many_pixels_is_refused_before_it_is_decoded(without_torchvision):
    with pytest.raises(SampleError) as refused:
        decoding.decode_with_torchvision(jpeg(PICTURE), ImageLimits(max_pixels=1000))
    assert refused.value.status == Status.TOO_LARGE


def outcome(decode, data: bytes) -> object:
    try:
        return decode(data).tobytes()
    except SampleError as error:
        return str(error), error.status


@settings(max_examples=150, deadline=None)
@given(
    progressive=st.booleans(),
    cut=st.integers(3, 4000),
    flips=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 7)), max_size=3),
)
def test_of_damaged_bytes_pillow_has_the_last_word(progressive, cut, flips):
    data = bytearray(jpeg(PICTURE[:24, :24], progressive=progressive))
    for place, bit in flips:
        data[place % len(data)] ^= 1 << bit
    data = bytes(data[:cut])
    assert outcome(decoding.decode_with_torchvision, data) == outcome(decode_image, data)


def test_a_torchvision_that_decodes_otherwise_is_noticed_and_left_alone(monkeypatch):
    decode = torch.ops.image.decode_jpeg
    monkeypatch.setattr(torch.ops.image, "decode_jpeg", lambda *given, **options: decode(*given, **options) ^ 1)
    decoding.is_torchvision_exact.cache_clear()
    try:
        assert not decoding.is_torchvision_exact()
        np.testing.assert_array_equal(decoding.decode_with_torchvision(jpeg(PICTURE)), decode_image(jpeg(PICTURE)))
    finally:
        monkeypatch.undo()
        decoding.is_torchvision_exact.cache_clear()
    assert decoding.is_torchvision_exact()


def test_a_torchvision_without_jpeg_is_left_alone(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("not compiled with libjpeg support")

    monkeypatch.setattr(torch.ops.image, "decode_jpeg", refuse)
    decoding.is_torchvision_exact.cache_clear()
    try:
        np.testing.assert_array_equal(decoding.decode_with_torchvision(jpeg(PICTURE)), decode_image(jpeg(PICTURE)))
        assert not decoding.is_torchvision_exact()
    finally:
        decoding.is_torchvision_exact.cache_clear()
