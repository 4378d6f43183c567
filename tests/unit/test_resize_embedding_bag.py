"""Every resized image is compared bit for bit with Pillow."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from featpipe.backbones import Transform
from featpipe.backbones.resize import embedding_bag
from featpipe.backbones.resize.embedding_bag import EMBEDDING_BAG_MAX_TAPS, ResizeAxis
from featpipe.data import compute_resize_weights, resize_image, to_rgb
from tests.support.resizing import axes

FILTERS = ("bilinear", "bicubic")
NOISE = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)
CENTER_CROP_AXES = ResizeAxis(375, 256, 16, 224), ResizeAxis(500, 341, 58, 224)


def to_tensor(picture: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)


def resize_array(picture: NDArray[np.uint8], axes: tuple[ResizeAxis, ResizeAxis], filter_: str) -> NDArray[np.uint8]:
    return embedding_bag.resize(to_tensor(picture), *axes, filter_).permute(1, 2, 0).numpy()


def resize_with_pillow(
    picture: NDArray[np.uint8], axes: tuple[ResizeAxis, ResizeAxis], filter_: str
) -> NDArray[np.uint8]:
    size, filter_ = (axes[1].resized_size, axes[0].resized_size), Image.Resampling[filter_.upper()]
    left, top = axes[1].crop_start, axes[0].crop_start
    box = (left, top, left + axes[1].crop_length, top + axes[0].crop_length)
    return np.asarray(Image.fromarray(picture).resize(size, filter_).crop(box))


def uncropped_axis(before: int, after: int) -> ResizeAxis:
    return ResizeAxis(before, after, 0, after)


@pytest.fixture
def forbid_embedding_bag(monkeypatch):
    def refuse(*_):
        raise AssertionError("the embedding bag was used")

    monkeypatch.setattr(embedding_bag, "_resize_by_embedding_bag", refuse)


@pytest.fixture
def forbid_pillow(monkeypatch):
    embedding_bag.is_exact()

    def refuse(*_):
        raise AssertionError("Pillow was used")

    monkeypatch.setattr(embedding_bag, "resize_image", refuse)


@st.composite
def pictures(draw: st.DrawFn, height: int, width: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["noise", "extremes", "checkerboard", "stripes", "flat"]))
    if kind == "flat":
        return np.full((height, width, 3), draw(st.integers(0, 255)), np.uint8)
    if kind == "noise":
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == "extremes":
        return rng.choice(np.uint8([0, 255]), (height, width, 3))
    y, x = np.ogrid[:height, :width]
    size = draw(st.integers(1, 7))
    squares = (x // size + (y // size if kind == "checkerboard" else 0 * y)) % 2
    return np.repeat(squares.astype(np.uint8)[..., None] * 255, 3, axis=2)


@settings(max_examples=250, deadline=None)
@given(vertical=axes(), horizontal=axes(), filter_=st.sampled_from(FILTERS), data=st.data())
def test_any_crop_of_any_resized_image_is_bit_identical_to_pillow(vertical, horizontal, filter_, data):
    picture = data.draw(pictures(vertical.source_size, horizontal.source_size))
    axis_pair = vertical, horizontal
    np.testing.assert_array_equal(
        resize_array(picture, axis_pair, filter_), resize_with_pillow(picture, axis_pair, filter_)
    )


@settings(max_examples=60, deadline=None)
@given(vertical=axes(), horizontal=axes(), filter_=st.sampled_from(FILTERS))
def test_the_embedding_bag_is_exact_for_all_supported_axes(vertical, horizontal, filter_):
    down, across = (axis.source_size - axis.resized_size for axis in (vertical, horizontal))
    assume(
        max(vertical.taps(filter_), horizontal.taps(filter_)) <= EMBEDDING_BAG_MAX_TAPS and down <= max(0, 2 * across)
    )
    picture = np.random.default_rng(0).integers(
        0, 256, (vertical.source_size, horizontal.source_size, 3), dtype=np.uint8
    )
    summed = (
        embedding_bag._resize_by_embedding_bag(to_tensor(picture), vertical, horizontal, filter_)
        .permute(1, 2, 0)
        .numpy()
    )
    np.testing.assert_array_equal(summed, resize_with_pillow(picture, (vertical, horizontal), filter_))


@pytest.mark.parametrize("filter_", FILTERS)
@pytest.mark.parametrize(
    "axis_pair",
    [(uncropped_axis(300, 60), uncropped_axis(100, 40)), (uncropped_axis(300, 300), uncropped_axis(1300, 9))],
    ids=["tall", "many taps"],
)
def test_unsupported_axes_are_resized_by_pillow(axis_pair, filter_, forbid_embedding_bag):
    picture = np.random.default_rng(1).integers(
        0, 256, (axis_pair[0].source_size, axis_pair[1].source_size, 3), dtype=np.uint8
    )
    np.testing.assert_array_equal(
        resize_array(picture, axis_pair, filter_), resize_with_pillow(picture, axis_pair, filter_)
    )


@pytest.mark.parametrize("filter_", FILTERS)
def test_the_largest_sums_are_exact(filter_, forbid_pillow):
    shrink = EMBEDDING_BAG_MAX_TAPS // (2 * embedding_bag.FILTER_SUPPORT[filter_])
    axis = uncropped_axis(16 * shrink, 16)
    assert axis.taps(filter_) == EMBEDDING_BAG_MAX_TAPS
    weights = compute_resize_weights(axis.source_size, axis.resized_size, filter_, EMBEDDING_BAG_MAX_TAPS)
    tap_weights = weights[np.arange(axis.source_size) % EMBEDDING_BAG_MAX_TAPS, 8]  # of an output pixel in the middle
    positive, low_is_negative = tap_weights > 0, (tap_weights + 256) % 512 < 256
    for bright in (positive, ~positive, low_is_negative, ~low_is_negative):
        row = np.where(bright, 255, 0).astype(np.uint8)
        picture = np.repeat(np.tile(row, (24, 1))[..., None], 3, axis=2)
        for oriented in (picture, picture.transpose(1, 0, 2).copy()):
            axis_pair = tuple(uncropped_axis(n, 16 if n == axis.source_size else n) for n in oriented.shape[:2])
            expected = resize_with_pillow(oriented, axis_pair, filter_)
            summed = (
                embedding_bag._resize_by_embedding_bag(to_tensor(oriented), *axis_pair, filter_)
                .permute(1, 2, 0)
                .numpy()
            )
            np.testing.assert_array_equal(summed, expected)


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (768, 1024), (90, 100)])
def test_a_center_crop_of_common_sizes_needs_no_pillow(size, forbid_pillow):
    picture = np.random.default_rng(2).integers(0, 256, (*size, 3), dtype=np.uint8)
    vertical, horizontal = Transform(256, (224, 224))._compute_resized_size(*size)
    axis_pair = (
        ResizeAxis(size[0], vertical, (vertical - 224) // 2, 224),
        ResizeAxis(size[1], horizontal, (horizontal - 224) // 2, 224),
    )
    np.testing.assert_array_equal(
        resize_array(picture, axis_pair, "bicubic"), resize_with_pillow(picture, axis_pair, "bicubic")
    )


@pytest.mark.parametrize("filter_", FILTERS)
def test_real_photographs_are_bit_identical_to_pillow(filter_):
    skimage, sklearn = pytest.importorskip("skimage.data"), pytest.importorskip("sklearn.datasets")
    names = ("astronaut", "brick", "chelsea", "coffee", "coins", "immunohistochemistry", "moon", "retina", "rocket")
    photographs = [to_rgb(getattr(skimage, name)()) for name in names]
    photographs += [np.array(photograph) for photograph in sklearn.load_sample_images().images]
    for photograph in photographs:
        transform = Transform(256, (224, 224), filter_)
        height, width = transform._compute_resized_size(*photograph.shape[:2])
        top, left = round((height - 224) / 2), round((width - 224) / 2)
        axis_pair = ResizeAxis(photograph.shape[0], height, top, 224), ResizeAxis(photograph.shape[1], width, left, 224)
        expected = resize_with_pillow(photograph, axis_pair, filter_)
        np.testing.assert_array_equal(resize_array(photograph, axis_pair, filter_), expected)
        np.testing.assert_array_equal(transform.prepare(to_tensor(photograph)).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(("before", "after"), [(500, 341), (375, 256), (61, 200), (1000, 37), (7, 7)])
@pytest.mark.parametrize("filter_", FILTERS)
def test_the_weights_are_those_of_the_filter_in_units_of_two_to_the_minus_22(before, after, filter_):
    kernels = {
        "bilinear": lambda x: np.clip(1 - x, 0, None),
        "bicubic": lambda x: np.where(
            x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0)
        ),
    }
    shrink = max(1, before / after)
    centre = (np.arange(after) + 0.5) * before / after
    expected = kernels[filter_](np.abs(np.arange(before)[:, None] + 0.5 - centre) / shrink)
    expected *= 2**22 / expected.sum(0)
    axis = uncropped_axis(before, after)
    taps = axis.taps(filter_)
    weights = compute_resize_weights(before, after, filter_, taps)
    actual = np.zeros((before, after))
    for pixel in range(taps):
        rows = axis.first_taps(filter_) + pixel
        actual[rows, np.arange(after)] = weights[rows % taps, np.arange(after)]
    assert np.abs(actual - expected).max() <= 0.5 + 1e-6


def test_the_strip_size_does_not_change_a_bit(monkeypatch, forbid_pillow):
    expected = resize_array(NOISE, CENTER_CROP_AXES, "bicubic")
    for values in (1, 3_000, 100_000):
        monkeypatch.setattr(embedding_bag, "MAX_STRIP_VALUES", values)
        np.testing.assert_array_equal(resize_array(NOISE, CENTER_CROP_AXES, "bicubic"), expected)


def test_memory_layout_does_not_change_a_bit():
    expected = resize_array(NOISE, CENTER_CROP_AXES, "bicubic")
    planes, window = to_tensor(NOISE).contiguous(), np.zeros((400, 640, 3), np.uint8)
    window[10:385, 20:520] = NOISE
    for image in (planes, to_tensor(window)[:, 10:385, 20:520], to_tensor(NOISE[::-1].copy()).flip(1)):
        actual = embedding_bag.resize(image, *CENTER_CROP_AXES, "bicubic").permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(actual, expected)


def test_a_pillow_with_other_results_is_detected_and_used(monkeypatch):
    resize = resize_image
    monkeypatch.setattr(embedding_bag, "resize_image", lambda *arguments: resize(*arguments) ^ 1)
    embedding_bag.is_exact.cache_clear()
    try:
        assert not embedding_bag.is_exact()
        np.testing.assert_array_equal(
            resize_array(NOISE, CENTER_CROP_AXES, "bicubic"), resize_with_pillow(NOISE, CENTER_CROP_AXES, "bicubic") ^ 1
        )
    finally:
        monkeypatch.undo()
        embedding_bag.is_exact.cache_clear()
    assert embedding_bag.is_exact()


def test_threads_can_resize_concurrently():
    expected = [
        resize_array(NOISE[:, : 200 + 40 * i], (CENTER_CROP_AXES[0], uncropped_axis(200 + 40 * i, 180)), "bicubic")
        for i in range(4)
    ]
    embedding_bag._make_resize_pass.cache_clear()
    results: dict[int, list[NDArray[np.uint8]]] = {}

    def resize_repeatedly(i: int) -> None:
        picture, axis_pair = NOISE[:, : 200 + 40 * i], (CENTER_CROP_AXES[0], uncropped_axis(200 + 40 * i, 180))
        results[i] = [resize_array(picture, axis_pair, "bicubic") for _ in range(5)]

    threads = [threading.Thread(target=resize_repeatedly, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        for actual in results[i]:
            np.testing.assert_array_equal(actual, expected[i])


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 3, 5, 7), (2, 2, 3, 4, 4)])
def test_normalization_is_bit_identical_to_the_formula_in_any_layout(shape):
    transform = Transform(8, (8, 8))
    generator = torch.Generator().manual_seed(0)
    planes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (transform.mean, transform.std))
    expected = (planes.to(torch.float32) / 255 - mean) / std
    channels_last = planes.movedim(-3, -1).contiguous().movedim(-1, -3)
    for picture in (planes, channels_last, planes.mT.contiguous().mT):
        assert torch.equal(transform.normalize(picture), expected)
    assert transform.normalize(channels_last).stride() == channels_last.stride()
