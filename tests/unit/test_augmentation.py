"""Augmented views: reproducible, and equal to the transform without augmentation."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from featpipe.backbones import CustomTransform, Transform
from featpipe.errors import ConfigError
from featpipe.finetuning.augmentation import Augmentation, AugmentedTransform, seeded_random
from tests.support.images import picture
from tests.support.networks import tiny_transform

ALL_AUGMENTATIONS = Augmentation(
    crop=0.5, flip=0.5, rotation=10, color=0.2, rand_augment=9, blur=1, noise=0.1, erase=0.5
)
TRANSFORM = Transform(28, (24, 24))
NAMES = [field.name for field in fields(Augmentation)]


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    return [torch.from_numpy(np.array(picture(seed))).permute(2, 0, 1) for seed in range(12)]


def test_without_augmentation_a_view_equals_the_transform_to_the_bit(images):
    for number in (0, 3):
        view = AugmentedTransform(TRANSFORM, Augmentation(), number, seed=1)
        assert all(torch.equal(view(image), TRANSFORM(image)) for image in images)
        assert view.to_dict() == TRANSFORM.to_dict()


def test_a_view_is_the_same_alone_and_in_any_thread_and_order(images):
    views = [AugmentedTransform(TRANSFORM, ALL_AUGMENTATIONS, number) for number in range(2)]
    view_image_pairs = [(view, image) for image in images for view in views]
    sequential = [view(image) for view, image in view_image_pairs]
    with ThreadPoolExecutor(4) as pool:
        concurrent = list(pool.map(lambda item: item[0](item[1]), reversed(view_image_pairs)))
    assert all(torch.equal(a, b) for a, b in zip(sequential, reversed(concurrent), strict=True))


def test_the_global_random_generator_is_not_touched(images):
    before = torch.get_rng_state()
    for image in images:
        AugmentedTransform(TRANSFORM, ALL_AUGMENTATIONS)(image)
    assert torch.equal(torch.get_rng_state(), before)


def test_views_differ_by_number_seed_and_image(images):
    result = [
        AugmentedTransform(TRANSFORM, ALL_AUGMENTATIONS, n, s)(images[p])
        for n, s, p in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    assert all(image.shape == (3, 24, 24) and image.dtype == torch.float32 for image in result)
    assert all(not torch.equal(result[i], result[j]) for i in range(4) for j in range(i))


@pytest.mark.parametrize("name", NAMES)
def test_each_augmentation_changes_some_images_and_the_fingerprint(images, name):
    view = AugmentedTransform(TRANSFORM, Augmentation(**{name: getattr(ALL_AUGMENTATIONS, name)}))
    changed = [not torch.equal(view(image), TRANSFORM(image)) for image in images]
    assert sum(changed) >= 2
    if name in ("flip", "erase"):  # change only a share of the images
        assert sum(changed) < len(changed)
    views = [
        view,
        replace(view, view_index=1),
        replace(view, seed=1),
        AugmentedTransform(TRANSFORM, ALL_AUGMENTATIONS),
        AugmentedTransform(TRANSFORM, Augmentation()),
    ]
    assert len({str(variant.to_dict()) for variant in views}) == 5


def test_a_flip_mirrors_and_noise_has_the_given_deviation(images):
    flipped = AugmentedTransform(TRANSFORM, Augmentation(flip=1.0)).prepare(images[0])
    assert torch.equal(flipped, TRANSFORM.prepare(images[0]).flip(-1))
    gray = torch.full((3, 200, 200), 128, dtype=torch.uint8)
    noisy = AugmentedTransform(Transform(None, (200, 200)), Augmentation(noise=0.1)).prepare(gray).float() / 255
    assert float(noisy.std()) == pytest.approx(0.1, rel=0.02)


def test_a_custom_transform_gets_the_augmented_image(images):
    custom_transform = CustomTransform(tiny_transform)
    view = AugmentedTransform(custom_transform, Augmentation(flip=1.0))
    assert torch.equal(view(images[0]), custom_transform(images[0].flip(-1)))
    assert AugmentedTransform(custom_transform, ALL_AUGMENTATIONS)(images[0]).shape == (3, 12, 12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [-0.1, 1e6, "much", True])
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"augmentation {name} is .*give a number from 0 to"):
        Augmentation(**{name: value})


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match="rotation"):
        Augmentation.from_dict({"rotatoin": 3})
    with pytest.raises(ConfigError, match="whole number"):
        Augmentation(rand_augment=2.5)  # type: ignore[arg-type]


def test_random_numbers_are_seeded_only_in_the_current_thread():
    def draw_numbers() -> list[Tensor]:
        return [torch.rand(2), torch.randn_like(torch.zeros(2)), torch.randperm(5), torch.empty(2).uniform_(0, 1)]

    with seeded_random(1):
        first_draw = draw_numbers()
    with seeded_random(1):
        second_draw = draw_numbers()
        with ThreadPoolExecutor(1) as pool:
            drawn_elsewhere = pool.submit(torch.rand, 2).result()
    assert all(torch.equal(a, b) for a, b in zip(first_draw, second_draw, strict=True))
    assert not torch.equal(drawn_elsewhere, first_draw[0])
