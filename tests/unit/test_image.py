"""Decoded images, compared with the encoded pixels or with the plain calls of Pillow."""

from __future__ import annotations

import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from featpipe.data import BACKGROUND, ImageLimits, decode_image, encode_png, encode_thumbnail, to_rgb
from featpipe.errors import ConfigError, SampleError
from featpipe.status import Status

NOISE = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
SMOOTH = np.add.outer(np.arange(24), np.arange(32))[..., None].astype(np.uint8) * np.uint8([3, 2, 1])


def encode(picture: Image.Image | NDArray[Any], kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoding_error(data: bytes, limits: ImageLimits = ImageLimits()) -> SampleError:  # noqa: B008
    with pytest.raises(SampleError) as error_info:
        decode_image(data, limits)
    assert "\n" not in str(error_info.value)
    return error_info.value


def decode_or_status(data: bytes) -> NDArray[np.uint8] | Status:
    try:
        return decode_image(data, ImageLimits(max_pixels=2**20))
    except SampleError as error:
        return error.status


def make_png(width: int, height: int, depth: int, colour: int, rows: bytes, **chunks: bytes) -> bytes:
    """Make a PNG chunk by chunk, with exactly this content."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header_chunk = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    extra_chunks = b"".join(chunk(name.encode(), body) for name, body in chunks.items())
    return (
        b"\x89PNG\r\n\x1a\n" + header_chunk + extra_chunks + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def make_exif(orientation: int, order: str = "<", kind: int = 3) -> bytes:
    byte_order_mark = b"II" if order == "<" else b"MM"
    value = struct.pack(order + {1: "B3x", 3: "H2x", 4: "I"}[kind], orientation)
    other_entry = struct.pack(order + "HHI4x", 0x010F, 2, 1)
    return (
        b"Exif\0\0"
        + byte_order_mark
        + struct.pack(order + "HIH", 42, 8, 2)
        + other_entry
        + struct.pack(order + "HHI", 0x0112, kind, 1)
        + value
        + bytes(4)
    )


ENCODED_IMAGES: dict[str, bytes] = {
    "jpeg": encode(SMOOTH, "JPEG"),
    "progressive jpeg": encode(SMOOTH, "JPEG", progressive=True),
    "jpeg with exif": encode(SMOOTH, "JPEG", exif=make_exif(6)),
    "cmyk jpeg": encode(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG"),
    "png": encode(SMOOTH, "PNG"),
    "palette png": encode(Image.fromarray(SMOOTH).convert("P"), "PNG", transparency=3),
    "16-bit png": encode(SMOOTH[..., 0].astype(np.uint16) * 257, "PNG"),
    "webp": encode(SMOOTH, "WEBP"),
    "lossless webp": encode(SMOOTH, "WEBP", lossless=True),
    "gif": encode(Image.fromarray(SMOOTH).convert("P"), "GIF"),
    "bmp": encode(SMOOTH, "BMP"),
    "tiff": encode(SMOOTH, "TIFF"),
    "lzw tiff": encode(SMOOTH, "TIFF", compression="tiff_lzw"),
    "float tiff": encode(SMOOTH[..., 0].astype(np.float32), "TIFF"),
}


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_decode_to_the_encoded_pixels(kind: str) -> None:
    picture = decode_image(encode(NOISE, kind))
    np.testing.assert_array_equal(picture, NOISE)
    assert picture.dtype == np.uint8
    assert picture.flags.c_contiguous
    assert picture.flags.writeable


def test_lossless_webp_decodes_to_the_encoded_pixels() -> None:
    np.testing.assert_array_equal(decode_image(encode(NOISE, "WEBP", lossless=True)), NOISE)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 40, "subsampling": 2}])
def test_jpeg_pixels_equal_those_of_pillow(options: dict[str, Any]) -> None:
    data = encode(SMOOTH, "JPEG", **options)
    np.testing.assert_array_equal(decode_image(data), np.asarray(Image.open(BytesIO(data)).convert("RGB")))


def test_a_large_image_is_copied_correctly_in_bands() -> None:
    large = np.random.default_rng(1).integers(0, 256, (1500, 1400, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode_image(encode(large, "BMP")), large)


def test_a_multi_picture_jpeg_decodes_to_its_main_picture() -> None:
    main_picture, second_picture = Image.fromarray(SMOOTH), Image.fromarray(255 - SMOOTH)
    data = encode(main_picture, "MPO", save_all=True, append_images=[second_picture])
    assert Image.open(BytesIO(data)).format == "MPO"
    np.testing.assert_array_equal(decode_image(data), decode_image(encode(main_picture, "JPEG")))


def test_an_animated_gif_decodes_to_its_first_frame() -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode_image(data), np.full((4, 6, 3), (255, 0, 0)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_applied_as_pillow_does(kind: str, orientation: int) -> None:
    tags = Image.Exif()
    tags[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(SMOOTH, kind, exif=tags, **options)
    upright = ImageOps.exif_transpose(Image.open(BytesIO(data)))
    np.testing.assert_array_equal(decode_image(data), np.asarray(upright))


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", [1, 3, 4])
def test_orientation_is_read_in_either_byte_order_and_any_integer_type(order: str, kind: int) -> None:
    data = encode(NOISE, "PNG", exif=make_exif(6, order, kind))
    np.testing.assert_array_equal(decode_image(data), np.rot90(NOISE, -1))


@pytest.mark.parametrize(
    "block", [b"", b"Exif\0\0", b"Exif\0\0II*\0", b"Exif\0\0II*\0\xff\xff\xff\xff", make_exif(99), make_exif(6)[:-8]]
)
def test_malformed_exif_is_ignored_without_a_warning(block: bytes) -> None:
    segment = b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block
    plain = encode(SMOOTH, "JPEG")
    np.testing.assert_array_equal(decode_image(plain[:2] + segment + plain[2:]), decode_image(plain))


def composite_on_white(rgb: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.uint8]:
    opacity = alpha[..., None] / 255
    return np.rint(rgb * opacity + 255 * (1 - opacity)).astype(np.uint8)


def test_rgba_is_composited_on_white() -> None:
    alpha = np.linspace(0, 255, 35).astype(np.uint8).reshape(7, 5)
    data = encode(np.dstack([NOISE, alpha]), "PNG")
    assert BACKGROUND == (255, 255, 255)
    assert np.abs(decode_image(data).astype(int) - composite_on_white(NOISE, alpha)).max() <= 1


def test_gray_with_alpha_is_composited_on_white() -> None:
    alpha = np.linspace(0, 255, 35).astype(np.uint8).reshape(7, 5)
    data = encode(Image.fromarray(np.dstack([NOISE[..., 0], alpha]), "LA"), "PNG")
    gray = np.repeat(NOISE[..., :1], 3, axis=2)
    assert np.abs(decode_image(data).astype(int) - composite_on_white(gray, alpha)).max() <= 1


def test_a_transparent_palette_entry_is_white() -> None:
    palette = Image.fromarray(np.uint8([[0, 1, 2]]), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    for transparency in (1, bytes([255, 0, 255])):
        data = encode(palette, "PNG", transparency=transparency)
        np.testing.assert_array_equal(decode_image(data), [[[10, 20, 30], [255] * 3, [70, 80, 90]]])


@pytest.mark.parametrize(
    ("depth", "colour", "row", "transparent_colour", "expected"),
    [
        (8, 0, bytes([7, 200]), struct.pack(">H", 7), [[255] * 3, [200] * 3]),
        (16, 0, struct.pack(">2H", 514, 65535), struct.pack(">H", 514), [[255] * 3, [255] * 3]),
        (16, 0, struct.pack(">2H", 514, 515), struct.pack(">H", 515), [[2] * 3, [255] * 3]),
        (8, 2, bytes([1, 2, 3, 4, 5, 6]), struct.pack(">3H", 4, 5, 6), [[1, 2, 3], [255] * 3]),
    ],
)
def test_a_colour_that_is_declared_transparent_becomes_white(
    depth: int, colour: int, row: bytes, transparent_colour: bytes, expected: list[list[int]]
) -> None:
    np.testing.assert_array_equal(
        decode_image(make_png(2, 1, depth, colour, b"\0" + row, tRNS=transparent_colour)), [expected]
    )


def test_16_bit_gray_is_scaled_and_not_clipped() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(values / 257).astype(np.uint8)
    for kind in ("PNG", "TIFF"):
        picture = decode_image(encode(values, kind))
        np.testing.assert_array_equal(picture, np.repeat(expected[..., None], 3, axis=2))


def test_a_big_endian_16_bit_tiff_is_scaled_in_the_same_way() -> None:
    values = np.array([[0, 257, 32896, 65535]], ">u2")
    np.testing.assert_array_equal(decode_image(encode(values, "TIFF"))[0, :, 0], [0, 1, 128, 255])


def test_16_bit_colour_keeps_its_high_byte() -> None:
    data = make_png(1, 1, 16, 2, b"\0" + struct.pack(">3H", 0x12FF, 0x3400, 0x5678))
    np.testing.assert_array_equal(decode_image(data), [[[0x12, 0x34, 0x56]]])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.25, 0.5, 0.5], [64, 128, 128]),
        ([-10.0, 0.0, 10.0], [0, 128, 255]),
        ([7.0, 7.0, 7.0], [0, 0, 0]),
    ],
)
def test_floating_point_gray_is_scaled_by_the_documented_rule(values: list[float], expected: list[int]) -> None:
    data = encode(np.array([values], np.float32), "TIFF")
    np.testing.assert_array_equal(decode_image(data)[0, :, 0], expected)


def test_32_bit_gray_is_scaled_from_its_minimum_to_its_maximum() -> None:
    data = encode(np.array([[1000, 2_000_000, 1_008_000]], np.int32), "TIFF")
    np.testing.assert_array_equal(decode_image(data)[0, :, 0], [0, 255, 128])


def test_floating_point_gray_that_is_not_finite_is_damaged() -> None:
    assert decoding_error(encode(np.array([[0, np.nan]], np.float32), "TIFF")).status is Status.DAMAGED


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("TIFF", mode) for mode in ("1", "L", "P", "CMYK", "YCbCr")),
        *(("PNG", mode) for mode in ("1", "L", "P")),
        *(("JPEG", mode) for mode in ("1", "L", "CMYK", "YCbCr")),
        *(("BMP", mode) for mode in ("1", "L", "P")),
    ],
)
def test_other_modes_are_converted_to_rgb_as_pillow_does(kind: str, mode: str) -> None:
    if (kind, mode) == ("TIFF", "YCbCr") and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("Pillow before 13 cannot read an uncompressed YCbCr TIFF")
    data = encode(Image.fromarray(SMOOTH).convert(mode), kind)
    np.testing.assert_array_equal(decode_image(data), np.asarray(Image.open(BytesIO(data)).convert("RGB")))


def test_lab_is_converted_to_srgb() -> None:
    data = encode(Image.new("LAB", (1, 1), (255, 128, 128)), "TIFF")
    assert decode_image(data).min() >= 250


@pytest.mark.parametrize("mode", ["La", "RGBa", "HSV", "PA"])
def test_modes_that_only_pillow_images_have_are_converted_to_rgb(mode: str) -> None:
    source = Image.fromarray(SMOOTH).convert({"La": "LA", "RGBa": "RGBA", "HSV": "RGB", "PA": "P"}[mode])
    expected = np.asarray(source.convert("RGB"))
    assert np.abs(to_rgb(source.convert(mode)).astype(int) - expected).max() <= 8


def test_zero_bytes_have_the_status_empty() -> None:
    assert decoding_error(b"").status is Status.EMPTY


@pytest.mark.parametrize(
    "data", [b"<svg/>", b"GIF", b"%PDF-1.7", b"P6 1 1 255 abc", b"\0\0\1\0", b"\0\0\0\x18ftypheic", b"RIFF"]
)
def test_other_formats_are_unsupported(data: bytes) -> None:
    assert decoding_error(data).status is Status.UNSUPPORTED


@pytest.mark.parametrize("name", ENCODED_IMAGES)
def test_a_truncated_image_is_damaged_and_never_filled_with_gray(name: str) -> None:
    data = ENCODED_IMAGES[name]
    expected = decode_image(data)
    for length in range(12, len(data), max(1, len(data) // 150)):
        outcome = decode_or_status(data[:length])
        if isinstance(outcome, np.ndarray):
            np.testing.assert_array_equal(outcome, expected)
        else:
            assert outcome in (Status.DAMAGED, Status.TOO_LARGE)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(ENCODED_IMAGES)), seed=st.integers(0, 2**32 - 1), flips=st.integers(1, 12))
def test_random_damage_raises_sample_errors_only(name: str, seed: int, flips: int) -> None:
    rng = np.random.default_rng(seed)
    data = np.frombuffer(ENCODED_IMAGES[name], np.uint8).copy()
    damaged_length = min(len(data), 200) if seed % 2 else len(data)
    data[rng.integers(0, damaged_length, flips)] = rng.integers(0, 256, flips)
    outcome = decode_or_status(data.tobytes())
    assert outcome.shape[2] == 3 if isinstance(outcome, np.ndarray) else outcome is not Status.OK


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0"]),
    st.binary(max_size=80),
)
def test_noise_after_a_signature_is_a_sample_error(signature: bytes, noise: bytes) -> None:
    decoding_error(signature + noise, ImageLimits(max_pixels=2**20))


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    data = make_png(100_000, 100_000, 8, 2, b"")
    assert decoding_error(data).status is Status.TOO_LARGE
    assert decoding_error(encode(NOISE, "PNG"), ImageLimits(max_pixels=34)).status is Status.TOO_LARGE
    np.testing.assert_array_equal(decode_image(encode(NOISE, "PNG"), ImageLimits(max_pixels=35)), NOISE)


def test_too_many_bytes_are_refused() -> None:
    data = encode(NOISE, "PNG")
    assert decoding_error(data, ImageLimits(max_bytes=len(data) - 1)).status is Status.TOO_LARGE


def test_a_large_image_within_the_limits_decodes_without_a_warning() -> None:
    data = make_png(10_000, 9_000, 1, 0, (b"\0" + bytes(1250)) * 9_000)
    assert Image.MAX_IMAGE_PIXELS is not None
    assert Image.MAX_IMAGE_PIXELS < 9_000 * 10_000
    assert decode_image(data).shape == (9_000, 10_000, 3)


def test_lack_of_memory_is_distinguished_from_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    assert decoding_error(encode(NOISE, "PNG")).status is Status.OUT_OF_MEMORY


def test_decoding_does_not_change_warning_filters_or_pillows_settings() -> None:
    state_before = (list(warnings.filters), Image.MAX_IMAGE_PIXELS)
    for data in ENCODED_IMAGES.values():
        decode_image(data)
    assert (list(warnings.filters), Image.MAX_IMAGE_PIXELS) == state_before


def test_decoding_is_thread_safe() -> None:
    expected = {name: decode_image(data) for name, data in ENCODED_IMAGES.items()}
    wrong_names: list[str] = []

    def decode_all() -> None:
        for _ in range(5):
            wrong_names.extend(
                name for name, data in ENCODED_IMAGES.items() if not np.array_equal(decode_image(data), expected[name])
            )

    threads = [threading.Thread(target=decode_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong_names == []


INPUT_ARRAYS: dict[str, tuple[Callable[[], NDArray[np.uint8]], Callable[[], NDArray[np.uint8]]]] = {
    "(h, w)": (lambda: NOISE[..., 0], lambda: np.repeat(NOISE[..., :1], 3, axis=2)),
    "(h, w, 1)": (lambda: NOISE[..., :1], lambda: np.repeat(NOISE[..., :1], 3, axis=2)),
    "(h, w, 3)": (lambda: NOISE, lambda: NOISE),
    "turned (h, w, 3)": (lambda: NOISE[::-1], lambda: NOISE[::-1]),
    "(h, w, 4)": (
        lambda: np.dstack([NOISE, np.zeros((7, 5), np.uint8)]),
        lambda: np.full((7, 5, 3), 255, np.uint8),
    ),
}


@pytest.mark.parametrize("shape", INPUT_ARRAYS)
def test_arrays_are_interpreted_as_gray_rgb_or_rgba(shape: str) -> None:
    make_array, make_expected = INPUT_ARRAYS[shape]
    picture = to_rgb(make_array())
    np.testing.assert_array_equal(picture, make_expected())
    assert picture.flags.c_contiguous
    assert picture.flags.writeable


def test_a_read_only_array_is_copied() -> None:
    read_only = NOISE.copy()
    read_only.flags.writeable = False
    assert to_rgb(read_only).flags.writeable


@pytest.mark.parametrize(
    "invalid",
    [NOISE / 255, NOISE[..., :2], np.zeros((0, 3, 3), np.uint8), NOISE[None], "a.jpg", NOISE.astype(int)],
)
def test_the_error_for_an_invalid_array_lists_what_is_accepted(invalid: Any) -> None:
    with pytest.raises(ConfigError, match=r"uint8 array of shape \(h, w\)"):
        to_rgb(invalid)


def test_a_pillow_image_and_its_file_give_the_same_pixels() -> None:
    for data in ENCODED_IMAGES.values():
        np.testing.assert_array_equal(to_rgb(Image.open(BytesIO(data))), decode_image(data))


def test_a_pillow_image_of_a_truncated_file_is_damaged() -> None:
    with pytest.raises(SampleError) as error_info:
        to_rgb(Image.open(BytesIO(ENCODED_IMAGES["tiff"][:-60])))
    assert error_info.value.status is Status.DAMAGED


def test_a_thumbnail_is_a_small_jpeg_without_metadata() -> None:
    picture = Image.open(BytesIO(encode_thumbnail(np.zeros((300, 200, 3), np.uint8), 96)))
    assert (picture.format, picture.size) == ("JPEG", (64, 96))
    assert not picture.getexif()


def test_an_encoded_png_decodes_to_the_same_pixels() -> None:
    np.testing.assert_array_equal(decode_image(encode_png(NOISE)), NOISE)
    np.testing.assert_array_equal(decode_image(encode_png(NOISE[..., 0]))[..., 1], NOISE[..., 0])
