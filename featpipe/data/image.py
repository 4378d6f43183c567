"""Decode untrusted bytes to a validated, upright RGB image, or raise a `SampleError` with the reason.

Decoding rules:

- Formats: JPEG, PNG, WebP, GIF (first frame), BMP and TIFF (first page), detected by their first bytes. Of a
  multi-picture JPEG (MPO) the main image is decoded. All other formats are ``unsupported``.
- The EXIF orientation is applied.
- Transparency of any kind is composited on white (`BACKGROUND`).
- 16-bit gray is scaled, not clipped: ``round(value / 257)``, so 65535 is white. A 12-bit TIFF is scaled by its own
  full scale. 16-bit colour keeps the high byte.
- Floating-point gray within [0, 1] is scaled by 255. Other floating-point and 32-bit gray has no defined full scale:
  the minimum becomes black and the maximum white.
- CMYK, YCbCr and palettes are converted to RGB by Pillow's formulas. Embedded colour profiles are not applied, as in
  the pipelines in which published weights were trained. CIE Lab is converted to sRGB.
- A truncated file is ``damaged``; missing pixels are never filled with gray.

Decoding changes no global state (neither warning filters nor Pillow's settings), so it is thread-safe.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from featpipe.errors import ConfigError, SampleError
from featpipe.status import Status

BACKGROUND = (255, 255, 255)
"""The background colour for transparent pixels: white."""


@dataclass(frozen=True)
class ImageLimits:
    """Limits on the size of one image.

    Attributes
    ----------
    max_pixels : int
        Width times height. The default is 512 MiB of RGB, which is also the limit of Pillow.
    max_bytes : int
        Size of the encoded image.
    """

    max_pixels: int = 512 * 2**20 // 3
    max_bytes: int = 512 * 2**20


DEFAULT_IMAGE_LIMITS = ImageLimits()

JpegDecoder = Callable[[bytes], NDArray[np.uint8] | None]
"""Decodes a colour JPEG to its stored pixels, (h, w, 3), C-contiguous and writable; None if it cannot."""


class _JpegFile(JpegImageFile):
    def _read_dpi_from_exif(self) -> None:
        """Do nothing: the resolution is not used, and malformed EXIF data would cause warnings."""


# Constructed directly: Image.open warns about large images through the process-wide warning filters, and converts
# multi-picture JPEGs.
_IMAGE_FILES: dict[str, type[ImageFile]] = {
    "JPEG": _JpegFile,
    "PNG": PngImageFile,
    "WebP": WebPImageFile,
    "GIF": GifImageFile,
    "BMP": BmpImageFile,
    "TIFF": TiffImageFile,
}

_SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
}

_EXIF_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

BYTES_PER_PIXEL = 12
"""Peak memory per pixel while decoding: Pillow's four bytes, four for compositing on the background, and the result."""

_PIXELS_PER_BAND = 2**20
_BITS_PER_SAMPLE, _PHOTOMETRIC, _ORIENTATION = 258, 262, 274
_WHITE_IS_ZERO = 0


def decode_image(
    data: bytes,
    limits: ImageLimits = DEFAULT_IMAGE_LIMITS,
    jpeg_decoder: JpegDecoder | None = None,
    reserve_memory: Callable[[int], None] | None = None,
) -> NDArray[np.uint8]:
    """Decode one image.

    Parameters
    ----------
    data : bytes
        The encoded image, from any source.
    limits : ImageLimits
        Checked before pixels are decoded.
    jpeg_decoder : JpegDecoder, optional
        Tried before Pillow; it must give the same bits.
    reserve_memory : callable, optional
        Called before decoding with the approximate number of bytes that decoding needs; it may block.

    Returns
    -------
    ndarray of shape (h, w, 3), uint8
        Upright RGB on white, C-contiguous, writable and owned by the caller.

    Raises
    ------
    SampleError
        With status ``EMPTY``, ``UNSUPPORTED``, ``DAMAGED``, ``TOO_LARGE`` or ``OUT_OF_MEMORY``. No input raises
        another exception.
    """
    image_format = _detect_format(data, limits)
    try:
        with _IMAGE_FILES[image_format](BytesIO(data)) as picture:
            _check_pixels(picture, limits)
            if reserve_memory is not None:
                reserve_memory(BYTES_PER_PIXEL * picture.width * picture.height)
            if jpeg_decoder is not None and image_format == "JPEG" and picture.mode == "RGB":
                pixels = jpeg_decoder(data)
                if pixels is not None and pixels.shape == (picture.height, picture.width, 3):
                    return _transpose_upright(pixels, _read_orientation(picture))
            picture.load()
            return _to_upright_rgb(picture)
    except SampleError:
        raise
    except Exception as error:
        raise _to_sample_error(image_format, error) from error


def to_rgb(picture: Image.Image | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Convert a decoded image to RGB, by the same rules as `decode_image`.

    Parameters
    ----------
    picture : Pillow image, or uint8 ndarray of shape (h, w), (h, w, 1), (h, w, 3) or (h, w, 4)
        Gray, RGB or RGBA. The EXIF orientation of a Pillow image is applied.

    Returns
    -------
    ndarray of shape (h, w, 3), uint8
        C-contiguous and writable; it shares memory with an input array that already has this form.

    Raises
    ------
    ConfigError
        If the array has another type or shape.
    SampleError
        If the pixels of a Pillow image cannot be loaded.
    """
    if isinstance(picture, Image.Image):
        try:
            picture.load()
            return _to_upright_rgb(picture)
        except SampleError:
            raise
        except Exception as error:
            raise _to_sample_error(picture.format or "Pillow", error) from error
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or not _is_image_shape(picture.shape):
        description = (
            f"{picture.dtype} of shape {picture.shape}" if isinstance(picture, np.ndarray) else type(picture).__name__
        )
        raise ConfigError(
            f"picture: {description}; expected a Pillow image or a uint8 array of shape (h, w), (h, w, 1), "
            "(h, w, 3) or (h, w, 4); scale and convert it first"
        )
    if picture.ndim == 3 and picture.shape[2] == 4:
        return _copy_pixels(_composite_on_background(Image.fromarray(np.ascontiguousarray(picture))))
    if picture.ndim == 2 or picture.shape[2] == 1:
        return np.repeat(picture.reshape(*picture.shape[:2], 1), 3, axis=2)
    return np.require(picture, requirements=["C", "W"])


def resize_image(picture: NDArray[np.uint8], height: int, width: int, interpolation: str) -> NDArray[np.uint8]:
    """Resize an image with antialiasing, bit-identical to Pillow.

    Parameters
    ----------
    picture : ndarray of shape (h, w, 3), uint8
    height, width : int
        Pixels.
    interpolation : {"bilinear", "bicubic"}
    """
    resampling = Image.Resampling[interpolation.upper()]
    return np.array(Image.fromarray(np.ascontiguousarray(picture)).resize((width, height), resampling))


def compute_resize_weights(input_size: int, output_size: int, interpolation: str, spacing: int) -> NDArray[np.int32]:
    """Compute Pillow's filter weights for one axis of `resize_image`, in units of 2⁻²².

    Pillow rounds the weights to this unit when it resizes 8-bit images. When it resizes 32-bit integers it does not
    round the weights but rounds the results in the same way. Resizing an impulse of height 2²² therefore gives the
    rounded weights.

    Parameters
    ----------
    input_size, output_size : int
        Pixels of the axis before and after resizing.
    interpolation : {"bilinear", "bicubic"}
    spacing : int
        Distance between impulses that share a row. At least the filter's support: the number of input pixels that
        contribute to one output pixel.

    Returns
    -------
    ndarray of shape (spacing, output_size), int32
        Row i holds, for each output pixel, the weight of the one input pixel among i, i + spacing, i + 2 spacing, …
        that contributes to it.
    """
    impulses = np.zeros((spacing, input_size), np.int32)
    pixels = np.arange(input_size)
    impulses[pixels % spacing, pixels] = 1 << 22
    return np.asarray(Image.fromarray(impulses).resize((output_size, spacing), Image.Resampling[interpolation.upper()]))


def encode_thumbnail(picture: NDArray[np.uint8], size: int = 96) -> bytes:
    """Encode a small JPEG without metadata, for reports.

    Parameters
    ----------
    picture : ndarray of shape (h, w, 3), uint8
    size : int
        Longest side in pixels; smaller images keep their size.
    """
    small = Image.fromarray(picture)
    small.thumbnail((size, size))
    return _encode(small, "JPEG", quality=85)


def encode_preview(data: bytes, size: int, limits: ImageLimits = DEFAULT_IMAGE_LIMITS) -> bytes:
    """Encode a small WebP of an encoded image, without metadata, for reports.

    Parameters
    ----------
    data : bytes
        From any source; invalid data raises the same errors as `decode_image`.
    size : int
        Longest side in pixels.
    limits : ImageLimits

    Notes
    -----
    A JPEG is decoded at the smallest DCT scale that suffices, which takes a fraction of the time.
    """
    image_format = _detect_format(data, limits)
    try:
        with _IMAGE_FILES[image_format](BytesIO(data)) as picture:
            _check_pixels(picture, limits)
            if image_format == "JPEG":
                picture.draft("RGB", (2 * size, 2 * size))
            picture.load()
            small = Image.fromarray(_to_upright_rgb(picture))
            small.thumbnail((size, size))
            return _encode(small, "WEBP", quality=60, method=2)
    except SampleError:
        raise
    except Exception as error:
        raise _to_sample_error(image_format, error) from error


def encode_png(picture: NDArray[np.uint8]) -> bytes:
    """Encode an image of shape (h, w, 3) or (h, w), uint8, as PNG."""
    return _encode(Image.fromarray(picture), "PNG")


def encode_jpeg(picture: NDArray[np.uint8], *, subsampling: int = 2, progressive: bool = False) -> bytes:
    """Encode an image of shape (h, w, 3), uint8, as JPEG; subsampling 0, 1, 2 is 4:4:4, 4:2:2, 4:2:0 as in Pillow."""
    return _encode(Image.fromarray(picture), "JPEG", subsampling=subsampling, progressive=progressive)


def _encode(picture: Image.Image, image_format: str, **options: int) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def _detect_format(data: bytes, limits: ImageLimits) -> str:
    if not data:
        raise SampleError("empty: there are no bytes", status=Status.EMPTY)
    if len(data) > limits.max_bytes:
        raise SampleError(
            f"{len(data)} bytes, at most {limits.max_bytes} are decoded; raise the limit, or shrink the image",
            status=Status.TOO_LARGE,
        )
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    for signature, image_format in _SIGNATURES.items():
        if data.startswith(signature):
            return image_format
    raise SampleError(
        f"begins with {data[:8]!r}, which is none of {', '.join(_IMAGE_FILES)}; convert it to one of them",
        status=Status.UNSUPPORTED,
    )


def _check_pixels(picture: Image.Image, limits: ImageLimits) -> None:
    width, height = picture.size
    if width * height > limits.max_pixels:
        raise SampleError(
            f"{width}×{height} pixels, at most {limits.max_pixels} are decoded; raise the limit, or shrink it",
            status=Status.TOO_LARGE,
        )


def _to_sample_error(image_format: str, error: Exception) -> SampleError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, MemoryError):
        return SampleError(f"{image_format}: not enough memory to decode it", status=Status.OUT_OF_MEMORY)
    if isinstance(error, Image.DecompressionBombError):
        return SampleError(f"{image_format}: {reason}", status=Status.TOO_LARGE)
    return SampleError(f"{image_format}: cannot be decoded: {reason}", status=Status.DAMAGED)


def _is_image_shape(shape: tuple[int, ...]) -> bool:
    return (len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))) and 0 not in shape


def _to_upright_rgb(picture: Image.Image) -> NDArray[np.uint8]:
    transpose = _EXIF_TRANSPOSES.get(_read_orientation(picture))
    rgb = _flatten_to_rgb(picture)
    return _copy_pixels(rgb if transpose is None else rgb.transpose(transpose))


def _transpose_upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    transpose = _EXIF_TRANSPOSES.get(orientation)
    return pixels if transpose is None else _copy_pixels(Image.fromarray(pixels).transpose(transpose))


def _flatten_to_rgb(picture: Image.Image) -> Image.Image:
    """Convert an image to mode RGB, without transparency."""
    if picture.mode.startswith("I") or picture.mode == "F":
        return Image.fromarray(_scale_gray_to_uint8(picture)).convert("RGB")
    if picture.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(lab, srgb, "LAB", "RGB").apply(picture)
    if picture.has_transparency_data:
        return _composite_on_background(picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _composite_on_background(picture: Image.Image) -> Image.Image:
    if picture.mode == "La":
        picture = picture.convert("LA")
    rgba = picture if picture.mode == "RGBA" else picture.convert("RGBA")
    rgb = Image.new("RGB", rgba.size, BACKGROUND)
    rgb.paste(rgba, mask=rgba.getchannel("A"))
    return rgb


def _scale_gray_to_uint8(picture: Image.Image) -> NDArray[np.uint8]:
    """Scale gray of more than 8 bits to shape (h, w), uint8, by the rules in the module docstring."""
    values = np.asarray(picture)
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG"):
        low, high = 0.0, 65535.0
        if isinstance(picture, TiffImageFile):
            high = 2.0 ** picture.tag_v2.get(_BITS_PER_SAMPLE, (16,))[0] - 1
            if picture.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
                low, high = high, low
    else:
        low, high = float(values.min()), float(values.max())
        if not np.isfinite([low, high]).all():
            raise SampleError("gray levels are not finite numbers", status=Status.DAMAGED)
        if picture.mode == "F" and low >= 0 and high <= 1:
            low, high = 0.0, 1.0
    levels = np.subtract(values, low, dtype=np.float64 if picture.mode == "I" else np.float32)
    levels *= 255 / (high - low) if high != low else 0
    gray = np.rint(levels, out=levels).astype(np.uint8)
    transparent_level = picture.info.get("transparency")
    if isinstance(transparent_level, int):
        gray[values == transparent_level] = BACKGROUND[0]
    return gray


def _copy_pixels(picture: Image.Image) -> NDArray[np.uint8]:
    """Copy the pixels in bands; a single copy of a large image would make Pillow hold it three times in memory."""
    width, height = picture.size
    band_rows = max(1, _PIXELS_PER_BAND // width)
    if band_rows >= height:
        return np.array(picture)
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, band_rows):
        bottom = min(top + band_rows, height)
        pixels[top:bottom] = np.asarray(picture.crop((0, top, width, bottom)))
    return pixels


def _read_orientation(picture: Image.Image) -> int:
    """Read the EXIF orientation, 1 to 8; 1 if it is missing or unreadable.

    Pillow's EXIF reader is not used because it warns about malformed data.
    """
    if isinstance(picture, TiffImageFile):
        return 1  # Pillow applies the orientation of a TIFF while loading
    exif = picture.info.get("exif")
    if not isinstance(exif, bytes):
        return 1
    tiff = exif.removeprefix(b"Exif\0\0")
    if tiff[:2] not in (b"II", b"MM"):
        return 1
    is_little_endian = tiff[:2] == b"II"

    def read_integer(start: int, size: int) -> int:
        return int.from_bytes(tiff[start : start + size], "little" if is_little_endian else "big")

    directory = read_integer(4, 4)
    for entry in range(directory + 2, min(directory + 2 + 12 * read_integer(directory, 2), len(tiff) - 11), 12):
        if read_integer(entry, 2) == _ORIENTATION:
            size = {1: 1, 3: 2, 4: 4}.get(read_integer(entry + 2, 2), 0)
            return read_integer(entry + 8, size)
    return 1
