"""Every decoded image is compared bit for bit with Pillow."""

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


def rotated_jpeg(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return jpeg(PICTURE, exif=exif)


@pytest.fixture
def forbid_torchvision(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("torchvision was used")

    decoding.is_torchvision_exact()
    monkeypatch.setattr(torch.ops.image, "decode_jpeg", refuse)


@pytest.fixture
def torchvision_sizes(monkeypatch):
    """The sizes of the images that torchvision decodes."""
    decoding.is_torchvision_exact()
    sizes, decode = [], torch.ops.image.decode_jpeg

    def record_size(*arguments, **options):
        pixels = decode(*arguments, **options)
        sizes.append(tuple(pixels.shape[1:]))
        return pixels

    monkeypatch.setattr(torch.ops.image, "decode_jpeg", record_size)
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
def test_any_jpeg_is_decoded_bit_identical_to_pillow(size, seed, coarse, quality, subsampling, progressive):
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, (*((3, 4) if coarse else size), 3), dtype=np.uint8)
    picture = resize_image(picture, *size, "bicubic") if coarse else picture
    data = jpeg(picture, quality=quality, subsampling=subsampling, progressive=progressive)
    decoded = decoding.decode_with_torchvision(data)
    np.testing.assert_array_equal(decoded, decode_image(data))
    assert decoded.flags.c_contiguous
    assert decoded.flags.writeable


@pytest.mark.parametrize("orientation", range(10))
def test_an_image_is_rotated_by_its_orientation_tag(orientation, torchvision_sizes):
    np.testing.assert_array_equal(
        decoding.decode_with_torchvision(rotated_jpeg(orientation)), decode_image(rotated_jpeg(orientation))
    )
    assert torchvision_sizes == [PICTURE.shape[:2]]


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_images_other_than_colour_jpegs_are_decoded_by_pillow(mode, forbid_torchvision):
    data = jpeg(PICTURE, mode)
    np.testing.assert_array_equal(decoding.decode_with_torchvision(data), decode_image(data))
    np.testing.assert_array_equal(decoding.decode_with_torchvision(encode_png(PICTURE)), PICTURE)


def test_an_image_with_too_many_pixels_is_refused_before_it_is_decoded(forbid_torchvision):
    with pytest.raises(SampleError) as refused:
        decoding.decode_with_torchvision(jpeg(PICTURE), ImageLimits(max_pixels=1000))
    assert refused.value.status == Status.TOO_LARGE


def decode_or_error(decode, data: bytes) -> object:
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
def test_damaged_bytes_are_judged_by_pillow(progressive, cut, flips):
    data = bytearray(jpeg(PICTURE[:24, :24], progressive=progressive))
    for position, bit in flips:
        data[position % len(data)] ^= 1 << bit
    data = bytes(data[:cut])
    assert decode_or_error(decoding.decode_with_torchvision, data) == decode_or_error(decode_image, data)


def test_a_torchvision_with_other_results_is_detected_and_not_used(monkeypatch):
    decode = torch.ops.image.decode_jpeg
    monkeypatch.setattr(torch.ops.image, "decode_jpeg", lambda *arguments, **options: decode(*arguments, **options) ^ 1)
    decoding.is_torchvision_exact.cache_clear()
    try:
        assert not decoding.is_torchvision_exact()
        np.testing.assert_array_equal(decoding.decode_with_torchvision(jpeg(PICTURE)), decode_image(jpeg(PICTURE)))
    finally:
        monkeypatch.undo()
        decoding.is_torchvision_exact.cache_clear()
    assert decoding.is_torchvision_exact()


def test_a_torchvision_without_jpeg_support_is_not_used(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("not compiled with libjpeg support")

    monkeypatch.setattr(torch.ops.image, "decode_jpeg", refuse)
    decoding.is_torchvision_exact.cache_clear()
    try:
        np.testing.assert_array_equal(decoding.decode_with_torchvision(jpeg(PICTURE)), decode_image(jpeg(PICTURE)))
        assert not decoding.is_torchvision_exact()
    finally:
        decoding.is_torchvision_exact.cache_clear()
