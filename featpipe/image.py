"""Untrusted bytes to a checked, upright RGB picture, or the reason why not.

What is decoded, and how:

- JPEG, PNG, WebP, GIF (first frame), BMP and TIFF (first page), told apart by their first bytes. A phone's
  multi-picture JPEG gives its main picture. Everything else is ``unsupported``.
- The picture is turned upright as its EXIF orientation says.
- Transparency is composited on white (`BACKGROUND`), whichever way the file states it.
- 16-bit gray is scaled, not clipped: ``round(value / 257)``, so 65535 is white; a 12-bit TIFF likewise by its
  own full scale. 16-bit colour keeps its high byte.
- Floating-point gray within [0, 1] is scaled by 255. Other floating-point and 32-bit gray states no full
  scale: its smallest value becomes black and its largest white.
- CMYK, YCbCr and palettes become RGB by Pillow's own formulas; embedded colour profiles are not applied, as
  in the pipelines in which published weights were trained. CIE Lab becomes sRGB.
- A truncated file is ``damaged``; what is missing is never filled with gray.

Decoding touches no global state, neither warning filters nor Pillow's settings, so that many threads may
decode at once.
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

__all__ = [
    "BACKGROUND",
    "LIMITS",
    "Jpeg",
    "Limits",
    "decode",
    "encode_jpeg",
    "encode_png",
    "preview",
    "resize",
    "resize_weights",
    "thumbnail",
    "to_rgb",
]

BACKGROUND = (255, 255, 255)
"""The colour, white, that shows through transparent pixels."""


@dataclass(frozen=True)
class Limits:
    """What one image may cost.

    Attributes
    ----------
    pixels : int
        Width times height. The default is 512 MiB of RGB, which is also where Pillow by itself refuses.
    bytes : int
        Size of the encoded image.
    """

    pixels: int = 512 * 2**20 // 3
    bytes: int = 512 * 2**20


LIMITS = Limits()

Jpeg = Callable[[bytes], NDArray[np.uint8] | None]
"""Gives the pixels of a colour JPEG as they are stored, (h, w, 3), C-contiguous and writable; None where it cannot."""


class _Jpeg(JpegImageFile):
    def _read_dpi_from_exif(self) -> None:
        """Leave EXIF alone: its resolution has no use here, and a malformed one would cause warnings."""


# Constructed directly rather than by Image.open, which warns about large pictures through the process-wide
# warning filters and takes multi-picture JPEGs apart.
_OPENERS: dict[str, type[ImageFile]] = {
    "JPEG": _Jpeg,
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

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

BYTES_A_PIXEL = 12
"""At most, while a picture is decoded: Pillow's four, four of one that is laid on a background, and the result."""

_BAND_PIXELS = 2**20
_BITS_PER_SAMPLE, _PHOTOMETRIC, _ORIENTATION = 258, 262, 274
_WHITE_IS_ZERO = 0


def decode(
    data: bytes, limits: Limits = LIMITS, jpeg: Jpeg | None = None, admit: Callable[[int], None] | None = None
) -> NDArray[np.uint8]:
    """Decode one image.

    Parameters
    ----------
    data : bytes
        The encoded image, from any source.
    limits : Limits
        Checked before pixels are decoded.
    jpeg : Jpeg, optional
        Is asked before Pillow is, and must give the same bits.
    admit : callable, optional
        Is told about how many bytes decoding is going to take, before it does, and may wait.

    Returns
    -------
    ndarray of shape (h, w, 3), uint8
        Upright RGB on white, C-contiguous, writable and owned by the caller.

    Raises
    ------
    SampleError
        With status ``EMPTY``, ``UNSUPPORTED``, ``DAMAGED``, ``TOO_LARGE`` or ``OUT_OF_MEMORY``. No other
        exception leaves, whatever the bytes are.
    """
    kind = _sniff(data, limits)
    try:
        with _OPENERS[kind](BytesIO(data)) as picture:
            _check_pixels(picture, limits)
            if admit is not None:
                admit(BYTES_A_PIXEL * picture.width * picture.height)
            if jpeg is not None and kind == "JPEG" and picture.mode == "RGB":
                pixels = jpeg(data)
                if pixels is not None and pixels.shape == (picture.height, picture.width, 3):
                    return _turned(pixels, _orientation(picture))
            picture.load()
            return _upright_rgb(picture)
    except SampleError:
        raise
    except Exception as error:
        raise _refusal(kind, error) from error


def to_rgb(picture: Image.Image | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Take a picture that is already decoded, by the same rules as `decode`.

    Parameters
    ----------
    picture : Pillow image, or uint8 ndarray of shape (h, w), (h, w, 1), (h, w, 3) or (h, w, 4)
        Gray, RGB or RGBA. A Pillow image that still carries an EXIF orientation is turned upright.

    Returns
    -------
    ndarray of shape (h, w, 3), uint8
        C-contiguous and writable; it may share memory with an array that already was so.

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
            return _upright_rgb(picture)
        except SampleError:
            raise
        except Exception as error:
            raise _refusal(picture.format or "Pillow", error) from error
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or not _is_picture(picture.shape):
        found = (
            f"{picture.dtype} of shape {picture.shape}" if isinstance(picture, np.ndarray) else type(picture).__name__
        )
        raise ConfigError(
            f"picture: {found}; expected a Pillow image or a uint8 array of shape (h, w), (h, w, 1), "
            "(h, w, 3) or (h, w, 4); scale and convert it first"
        )
    if picture.ndim == 3 and picture.shape[2] == 4:
        return _pixels(_on_background(Image.fromarray(np.ascontiguousarray(picture))))
    if picture.ndim == 2 or picture.shape[2] == 1:
        return np.repeat(picture.reshape(*picture.shape[:2], 1), 3, axis=2)
    return np.require(picture, requirements=["C", "W"])


def resize(picture: NDArray[np.uint8], height: int, width: int, filter_: str) -> NDArray[np.uint8]:
    """Resize a picture, antialiased, to the bit as Pillow does it.

    Parameters
    ----------
    picture : ndarray of shape (h, w, 3), uint8
    height, width : int
        Pixels.
    filter_ : {"bilinear", "bicubic"}
    """
    method = Image.Resampling[filter_.upper()]
    return np.array(Image.fromarray(np.ascontiguousarray(picture)).resize((width, height), method))


def resize_weights(before: int, after: int, filter_: str, spacing: int) -> NDArray[np.int32]:
    """How much each pixel of an axis counts in `resize`, in units of 2⁻²², as Pillow itself has it.

    A pass of Pillow's over 8-bit levels rounds its weights to that unit. A pass over 32-bit numbers does not, but
    rounds its results in the same way: so where the picture is 2²² in one pixel and 0 elsewhere, they are the weights.

    Parameters
    ----------
    before, after : int
        Pixels of the axis.
    filter_ : {"bilinear", "bicubic"}
    spacing : int
        Pixels that lie so far apart are tried at once. At least as many as count for one pixel of the result.

    Returns
    -------
    ndarray of shape (spacing, after), int32
        In row i the weight of that pixel, of those numbered i, i + spacing, i + 2 spacing, …, which counts at all.
    """
    impulses = np.zeros((spacing, before), np.int32)
    pixels = np.arange(before)
    impulses[pixels % spacing, pixels] = 1 << 22
    return np.asarray(Image.fromarray(impulses).resize((after, spacing), Image.Resampling[filter_.upper()]))


def thumbnail(picture: NDArray[np.uint8], size: int = 96) -> bytes:
    """A small JPEG without metadata, for reports.

    Parameters
    ----------
    picture : ndarray of shape (h, w, 3), uint8
    size : int
        The longest side in pixels; smaller pictures keep their size.
    """
    small = Image.fromarray(picture)
    small.thumbnail((size, size))
    return _encoded(small, "JPEG", quality=85)


def preview(data: bytes, size: int, limits: Limits = LIMITS) -> bytes:
    """A small WebP of an encoded image, without metadata, for reports.

    Parameters
    ----------
    data : bytes
        From any source; refused as `decode` does.
    size : int
        The longest side in pixels.

    Notes
    -----
    A JPEG is decoded at the smallest of its own scales that suffices, in a fraction of the time.
    """
    kind = _sniff(data, limits)
    try:
        with _OPENERS[kind](BytesIO(data)) as picture:
            _check_pixels(picture, limits)
            if kind == "JPEG":
                picture.draft("RGB", (2 * size, 2 * size))
            picture.load()
            small = Image.fromarray(_upright_rgb(picture))
            small.thumbnail((size, size))
            return _encoded(small, "WEBP", quality=60, method=2)
    except SampleError:
        raise
    except Exception as error:
        raise _refusal(kind, error) from error


def encode_png(picture: NDArray[np.uint8]) -> bytes:
    """The lossless PNG of a picture of shape (h, w, 3) or (h, w), uint8."""
    return _encoded(Image.fromarray(picture), "PNG")


def encode_jpeg(picture: NDArray[np.uint8], *, subsampling: int = 2, progressive: bool = False) -> bytes:
    """The JPEG of a picture of shape (h, w, 3), uint8; subsampling as Pillow's: 4:4:4, 4:2:2 or 4:2:0 by number."""
    return _encoded(Image.fromarray(picture), "JPEG", subsampling=subsampling, progressive=progressive)


def _encoded(picture: Image.Image, kind: str, **options: int) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _sniff(data: bytes, limits: Limits) -> str:
    if not data:
        raise SampleError("empty: there are no bytes", status=Status.EMPTY)
    if len(data) > limits.bytes:
        raise SampleError(
            f"{len(data)} bytes, at most {limits.bytes} are decoded; raise the limit, or shrink the image",
            status=Status.TOO_LARGE,
        )
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    for signature, kind in _SIGNATURES.items():
        if data.startswith(signature):
            return kind
    raise SampleError(
        f"begins with {data[:8]!r}, which is none of {', '.join(_OPENERS)}; convert it to one of them",
        status=Status.UNSUPPORTED,
    )


def _check_pixels(picture: Image.Image, limits: Limits) -> None:
    width, height = picture.size
    if width * height > limits.pixels:
        raise SampleError(
            f"{width}×{height} pixels, at most {limits.pixels} are decoded; raise the limit, or shrink it",
            status=Status.TOO_LARGE,
        )


def _refusal(kind: str, error: Exception) -> SampleError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, MemoryError):
        return SampleError(f"{kind}: not enough memory to decode it", status=Status.OUT_OF_MEMORY)
    if isinstance(error, Image.DecompressionBombError):
        return SampleError(f"{kind}: {reason}", status=Status.TOO_LARGE)
    return SampleError(f"{kind}: cannot be decoded: {reason}", status=Status.DAMAGED)


def _is_picture(shape: tuple[int, ...]) -> bool:
    return (len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))) and 0 not in shape


def _upright_rgb(picture: Image.Image) -> NDArray[np.uint8]:
    turn = _UPRIGHT.get(_orientation(picture))
    flat = _flat(picture)
    return _pixels(flat if turn is None else flat.transpose(turn))


def _turned(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    turn = _UPRIGHT.get(orientation)
    return pixels if turn is None else _pixels(Image.fromarray(pixels).transpose(turn))


def _flat(picture: Image.Image) -> Image.Image:
    """The picture in mode RGB, without transparency."""
    if picture.mode.startswith("I") or picture.mode == "F":
        return Image.fromarray(_gray(picture)).convert("RGB")
    if picture.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(lab, srgb, "LAB", "RGB").apply(picture)
    if picture.has_transparency_data:
        return _on_background(picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _on_background(picture: Image.Image) -> Image.Image:
    if picture.mode == "La":
        picture = picture.convert("LA")
    layer = picture if picture.mode == "RGBA" else picture.convert("RGBA")
    flat = Image.new("RGB", layer.size, BACKGROUND)
    flat.paste(layer, mask=layer.getchannel("A"))
    return flat


def _gray(picture: Image.Image) -> NDArray[np.uint8]:
    """Gray of more than 8 bits as shape (h, w), uint8, by the rules at the top of this module."""
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
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        gray[values == transparent] = BACKGROUND[0]
    return gray


def _pixels(picture: Image.Image) -> NDArray[np.uint8]:
    """Copy the pixels out, in bands, because Pillow would hold a large picture three times over."""
    width, height = picture.size
    rows = max(1, _BAND_PIXELS // width)
    if rows >= height:
        return np.array(picture)
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        pixels[top:bottom] = np.asarray(picture.crop((0, top, width, bottom)))
    return pixels


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or it cannot be read.

    Read here because Pillow's EXIF reader answers malformed data with warnings.
    """
    if isinstance(picture, TiffImageFile):
        return 1  # Pillow turns TIFF upright while loading
    exif = picture.info.get("exif")
    if not isinstance(exif, bytes):
        return 1
    tiff = exif.removeprefix(b"Exif\0\0")
    if tiff[:2] not in (b"II", b"MM"):
        return 1
    little = tiff[:2] == b"II"

    def number(start: int, size: int) -> int:
        return int.from_bytes(tiff[start : start + size], "little" if little else "big")

    directory = number(4, 4)
    for entry in range(directory + 2, min(directory + 2 + 12 * number(directory, 2), len(tiff) - 11), 12):
        if number(entry, 2) == _ORIENTATION:
            size = {1: 1, 3: 2, 4: 4}.get(number(entry + 2, 2), 0)
            return number(entry + 8, size)
    return 1
