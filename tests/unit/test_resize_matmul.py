"""Resizing by matrix products, compared bit for bit with Pillow and with the embedding bag."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from featpipe.backbones import Transform
from featpipe.backbones.resize import embedding_bag, matmul
from featpipe.backbones.resize.embedding_bag import FILTER_SUPPORT, ResizeAxis
from featpipe.backbones.resize.matmul import MATMUL_MAX_TAPS, MatmulResizer, is_exact, is_supported, max_resize_batch
from featpipe.data import resize_image
from featpipe.inference.devices import allow_tf32
from tests.support.devices import needs_gpu
from tests.support.resizing import axes

CPU = torch.device("cpu")
SIZES = ((1, 1), (3, 5), (31, 40), (64, 64), (90, 200), (375, 500), (500, 333), (640, 480))
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]


def uncropped_axis(before: int, after: int) -> ResizeAxis:
    return ResizeAxis(before, after, 0, after)


def resize_array(
    pictures: NDArray[np.uint8], axes: tuple[ResizeAxis, ResizeAxis], filter_: str, device: str = "cpu"
) -> NDArray[np.uint8]:
    rows, columns = (axis.source_slice(filter_) for axis in axes)
    pixels = torch.from_numpy(pictures[:, rows, columns]).permute(0, 3, 1, 2).to(device)
    with allow_tf32(False):
        result = MatmulResizer(torch.device(device)).resize(pixels, *axes, filter_)
    assert (result.dtype, result.device.type) == (torch.uint8, device)
    return result.permute(0, 2, 3, 1).cpu().numpy()


def resize_with_pillow(
    picture: NDArray[np.uint8], axes: tuple[ResizeAxis, ResizeAxis], filter_: str
) -> NDArray[np.uint8]:
    (top, left), size = (axis.crop_start for axis in axes), (axes[1].resized_size, axes[0].resized_size)
    box = (left, top, left + axes[1].crop_length, top + axes[0].crop_length)
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling[filter_.upper()]).crop(box))


def resize_with_embedding_bag(
    picture: NDArray[np.uint8], axes: tuple[ResizeAxis, ResizeAxis], filter_: str
) -> NDArray[np.uint8]:
    return embedding_bag.resize(torch.from_numpy(picture).permute(2, 0, 1), *axes, filter_).permute(1, 2, 0).numpy()


def make_hard_images(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Noise, noise of 0 and 255, checkerboards, stripes, and constant images of 0 and 255."""
    rng = np.random.default_rng(seed)
    y, x = np.ogrid[:height, :width]
    patterns = [(y + x) % 2, (y // 3 + x // 2) % 2, 0 * y + x % 2, y % 2 + 0 * x, 0 * (y + x), 0 * (y + x) + 1]
    flat = [np.repeat(255 * pattern.astype(np.uint8)[..., None], 3, axis=2) for pattern in patterns]
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.stack([noise, rng.choice(np.uint8([0, 255]), (height, width, 3)), *flat])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("filter_", FILTER_SUPPORT)
def test_hard_images_of_many_sizes_are_bit_identical_to_pillow(device, filter_):
    n_tested = 0
    for (height, width), (height_after, width_after) in product(SIZES, ((7, 9), (64, 48), (224, 224), (256, 341))):
        axes = uncropped_axis(height, height_after), uncropped_axis(width, width_after)
        if is_supported(*axes, filter_):
            pictures = make_hard_images(height, width)
            for picture, actual in zip(pictures, resize_array(pictures, axes, filter_, device), strict=True):
                np.testing.assert_array_equal(actual, resize_with_pillow(picture, axes, filter_))
            n_tested += 1
    assert n_tested > 20


@settings(max_examples=80, deadline=None)
@given(
    vertical=axes(20), horizontal=axes(20), filter_=st.sampled_from(sorted(FILTER_SUPPORT)), seed=st.integers(0, 2**32)
)
def test_any_crop_of_any_resized_image_is_bit_identical_to_pillow_and_the_embedding_bag(
    vertical, horizontal, filter_, seed
):
    axes = vertical, horizontal
    assume(is_supported(*axes, filter_))
    pictures = make_hard_images(vertical.source_size, horizontal.source_size, seed)[:3]
    for picture, actual in zip(pictures, resize_array(pictures, axes, filter_), strict=True):
        np.testing.assert_array_equal(actual, resize_with_pillow(picture, axes, filter_))
        np.testing.assert_array_equal(actual, resize_with_embedding_bag(picture, axes, filter_))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("filter_", FILTER_SUPPORT)
def test_the_largest_sums_are_exact(device, filter_):
    shrink = MATMUL_MAX_TAPS // (2 * FILTER_SUPPORT[filter_])
    axis = uncropped_axis(16 * shrink, 16)
    assert axis.taps(filter_) == MATMUL_MAX_TAPS
    weights = np.zeros(axis.source_size, np.int64)
    first_tap = axis.first_taps(filter_)[8]
    weights[first_tap : first_tap + MATMUL_MAX_TAPS] = axis.tap_weights(filter_)[8]
    low_is_negative = (weights + 1024) % 2048 < 1024
    for bright in (weights > 0, weights <= 0, low_is_negative, ~low_is_negative):
        row = np.where(bright, 255, 0).astype(np.uint8)
        picture = np.repeat(np.tile(row, (24, 1))[..., None], 3, axis=2)
        for oriented in (picture, picture.transpose(1, 0, 2).copy()):
            axes = tuple(uncropped_axis(n, 16 if n == axis.source_size else n) for n in oriented.shape[:2])
            if is_supported(*axes, filter_):
                actual = resize_array(oriented[None], axes, filter_, device)[0]
                np.testing.assert_array_equal(actual, resize_with_pillow(oriented, axes, filter_))


@pytest.mark.parametrize("filter_", FILTER_SUPPORT)
def test_absolute_weights_sum_to_less_than_the_bound_of_the_proof(filter_):
    largest = 0
    for before, after in product((1, 2, 3, 4, 5, 7, 11, 37, 64, 101, 256, 500), (1, 2, 3, 5, 8, 13, 31, 64, 224, 341)):
        axis = uncropped_axis(before, after)
        if axis.taps(filter_) <= MATMUL_MAX_TAPS:
            weights = axis.tap_weights(filter_).astype(np.int64)
            largest = max(largest, np.abs(weights).sum(1).max())
            assert abs(weights.sum(1) - 2**22).max() <= axis.taps(filter_)
    assert largest <= {"bilinear": 1.0, "bicubic": 1.4}[filter_] * 2**22 + MATMUL_MAX_TAPS < 2**23


@pytest.mark.parametrize(
    "axes", [(uncropped_axis(64, 64), uncropped_axis(500, 8)), (uncropped_axis(300, 60), uncropped_axis(100, 40))]
)
def test_unsupported_axes_are_refused(axes):
    assert not is_supported(*axes, "bicubic")
    with pytest.raises(ValueError, match="not exact as matrix products"):
        resize_array(make_hard_images(axes[0].source_size, axes[1].source_size), axes, "bicubic")


def test_the_matrix_cache_is_limited_in_bytes(monkeypatch):
    created_axes, make_matrix = [], matmul._make_matrix
    monkeypatch.setattr(
        matmul, "_make_matrix", lambda *arguments: created_axes.append(arguments[0]) or make_matrix(*arguments)
    )
    axes = [uncropped_axis(100 + i, 60) for i in range(4)]
    size = make_matrix(axes[3], "bicubic", CPU).nbytes
    monkeypatch.setattr(matmul, "MAX_CACHED_MATRIX_BYTES", 3 * size)
    resizer = MatmulResizer(CPU)
    for axis in (*axes[:3], axes[0], axes[3], axes[0], axes[1]):
        resizer._get_matrix(axis, "bicubic")
        assert resizer._cached_bytes == sum(matrix.nbytes for matrix in resizer._matrices.values()) <= 3 * size
    assert created_axes == [*axes, axes[1]]


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that torch creates."""

    values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        self.values = max([self.values, *(value.numel() for value in [result] if isinstance(value, torch.Tensor))])
        return result


@pytest.mark.parametrize("size", [(375, 500), (20, 33), (224, 1600)])
def test_the_batch_size_limits_the_largest_tensor(monkeypatch, size):
    monkeypatch.setattr(matmul, "MAX_TENSOR_VALUES", 2**21)
    axes = Transform(256, (224, 224)).resize_axes(*size)
    count = max_resize_batch(*axes, "bilinear")
    with LargestTensor() as largest:
        resize_array(np.zeros((count, *size, 3), np.uint8), axes, "bilinear")
    assert 2**20 < largest.values <= 2**21
    assert max_resize_batch(uncropped_axis(4000, 4000), uncropped_axis(4000, 4000), "bilinear") == 1


def test_an_inexact_or_unsupported_device_is_detected(monkeypatch):
    make_matrix = matmul._make_matrix

    def make_rounded(*arguments: object) -> torch.Tensor:
        return make_matrix(*arguments).to(torch.bfloat16).float()

    def raise_unsupported(*_: object) -> torch.Tensor:
        raise RuntimeError("not implemented for this device")

    for matrix_function, expected in ((make_matrix, True), (make_rounded, False), (raise_unsupported, False)):
        is_exact.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(matmul, "_make_matrix", matrix_function)
            assert is_exact(CPU) == expected
    is_exact.cache_clear()


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_is_exact():
    with allow_tf32(False):
        assert is_exact(torch.device("cuda"))


TRANSFORMS = [
    Transform(256, (224, 224), "bicubic"),
    Transform(24, (32, 32)),
    Transform((40, 60), (40, 60), mode="squash"),
    Transform((40, 60), (48, 60), "bicubic", mode="border"),
    Transform((40, 60), (30, 30), mode="center"),
]


GEOMETRIES = [
    (transform, size)
    for transform in TRANSFORMS
    for size in ((90, 120), (120, 90), (20, 33), (64, 20))
    if is_supported(*transform.resize_axes(*size), transform.interpolation)
]


@pytest.mark.parametrize(("transform", "size"), GEOMETRIES)
def test_resizing_a_batch_equals_the_transform_of_each_image(transform, size):
    pictures, axes = make_hard_images(*size), transform.resize_axes(*size)
    levels = torch.from_numpy(resize_array(pictures, axes, transform.interpolation)).permute(0, 3, 1, 2)
    for picture, actual in zip(pictures, transform.pad_to_crop(levels), strict=True):
        assert torch.equal(actual, transform.prepare(torch.from_numpy(picture).permute(2, 0, 1)))


def test_the_source_slice_holds_exactly_the_contributing_pixels():
    axis = ResizeAxis(500, 341, 58, 224)
    for filter_ in FILTER_SUPPORT:
        source_range, first_taps = axis.source_slice(filter_), axis.first_taps(filter_)
        assert (source_range.start, source_range.stop) == (first_taps.min(), first_taps.max() + axis.taps(filter_))
        impulse = np.zeros((1, 500, 3), np.uint8)
        impulse[:, : source_range.start], impulse[:, source_range.stop :] = 255, 255
        assert not resize_image(impulse, 1, 341, filter_)[:, axis.crop_slice].any()
