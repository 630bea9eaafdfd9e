import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from soteacher.data.augment import (
    AugmentConfig,
    apply_views,
    crop,
    draw_views,
    flip,
    resized_crop,
    to_unit_range,
)


def _images(count: int = 40, channels: int = 3, size: int = 12) -> torch.Tensor:
    shape = (count, channels, size, size)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("padding", [1, 4])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_crop_equals_padding_and_slicing_one_by_one(padding, dtype, channels):
    places = 2 * padding + 1
    offsets = torch.cartesian_prod(torch.arange(places), torch.arange(places))
    images = _images(len(offsets), channels).to(dtype)
    padded = F.pad(images, (padding,) * 4)
    wanted = [padded[i, :, y : y + 12, x : x + 12] for i, (y, x) in enumerate(offsets.tolist())]
    assert torch.equal(crop(images, offsets, padding=padding), torch.stack(wanted))


def test_crop_equals_torchvision():
    operators = pytest.importorskip("soteacher.torchvision_operators")
    operators.define_missing_operators()
    from torchvision.transforms import functional

    images, offsets = _images(), torch.randint(0, 9, (40, 2), generator=_generator())
    wanted = [
        functional.hflip(functional.crop(functional.pad(image, [4]), top, left, 12, 12))
        for image, (top, left) in zip(images, offsets.tolist(), strict=True)
    ]
    result = flip(crop(images, offsets, padding=4), torch.ones(40, dtype=torch.bool))
    assert torch.equal(result, torch.stack(wanted))


def test_crop_takes_images_that_are_not_contiguous():
    images, offsets = _images(), torch.randint(0, 5, (40, 2), generator=_generator())
    assert torch.equal(
        crop(images.to(memory_format=torch.channels_last), offsets, padding=2), crop(images, offsets, padding=2)
    )


def test_flip_mirrors_the_chosen():
    images, flips = _images(), torch.rand(40, generator=_generator()) < 0.5
    result = flip(images, flips)
    assert torch.equal(result[~flips], images[~flips])
    assert torch.equal(result[flips], images[flips].flip(-1))


def test_resized_crop_equals_cutting_and_interpolating():
    images = _images().float() / 255
    views = draw_views(AugmentConfig(crop_padding=0, random_resized_crop=(0.05, 1)), 40, _generator(), 12)
    assert views.boxes is not None
    wanted = [
        F.interpolate(images[i : i + 1, :, y : y + h, x : x + w], size=(12, 12), mode="bilinear", align_corners=False)
        for i, (y, x, h, w) in enumerate(views.boxes.tolist())
    ]
    torch.testing.assert_close(resized_crop(images, views.boxes), torch.cat(wanted), atol=1e-5, rtol=0)


def test_resized_crop_of_the_whole_image_changes_nothing():
    images = _images().float() / 255
    boxes = torch.tensor([0, 0, 12, 12]).expand(40, 4)
    torch.testing.assert_close(resized_crop(images, boxes), images, atol=1e-5, rtol=0)


def test_drawn_boxes_lie_within_the_image_and_the_ranges():
    config = AugmentConfig(crop_padding=0, random_resized_crop=(0.2, 0.5), horizontal_flip=False)
    views = draw_views(config, 5000, _generator(), 200)
    assert views.boxes is not None
    assert views.flips is None
    assert views.offsets is None
    top, left, height, width = views.boxes.double().unbind(1)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height).max() == 200  # the lower edge can be reached, and is not passed
    assert (left + width).max() == 200
    area, aspect = height * width / 200**2, width / height
    assert area.min() > 0.195
    assert area.max() < 0.505
    assert aspect.min() > 0.74
    assert aspect.max() < 1.35
    assert area.mean() == pytest.approx(0.35, abs=0.01)
    assert aspect.log().mean() == pytest.approx(0, abs=0.01)


def test_drawn_offsets_and_flips_are_uniform():
    views = draw_views(AugmentConfig(crop_padding=2), 50_000, _generator(), 32)
    assert views.offsets is not None
    assert views.flips is not None
    counts = torch.bincount(views.offsets.flatten())
    assert len(counts) == 5
    assert (counts / 100_000 - 0.2).abs().max() < 0.01
    assert views.flips.float().mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    "config",
    [AugmentConfig(), AugmentConfig(crop_padding=0, random_resized_crop=(0.3, 1.0))],
    ids=["padded", "resized"],
)
def test_apply_views_is_the_same_for_any_batching(config):
    images = _images()
    views = draw_views(config, 40, _generator(), 12)
    whole = apply_views(images, views, config)
    rows = torch.tensor([7, 3, 39])
    torch.testing.assert_close(apply_views(images[rows], views.select(rows), config), whole[rows], atol=0, rtol=0)
    assert whole.dtype == torch.float32
    assert whole.min() >= 0
    assert whole.max() <= 1


def test_apply_views_crops_flips_and_scales():
    images, config = _images(), AugmentConfig(crop_padding=3)
    views = draw_views(config, 40, _generator(), 12)
    assert views.offsets is not None
    assert views.flips is not None
    wanted = flip(crop(images, views.offsets, padding=3), views.flips).float() / 255
    assert torch.equal(apply_views(images, views, config), wanted)


def test_without_augmentation_images_are_only_scaled():
    config = AugmentConfig(crop_padding=0, horizontal_flip=False)
    images = _images()
    assert torch.equal(apply_views(images, draw_views(config, 40, _generator(), 12), config), images / 255)
    assert torch.equal(to_unit_range(images / 255), images / 255)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"crop_padding": -1}, "greater than or equal to 0"),
        ({"random_resized_crop": (0.3, 1)}, "crop_padding is 4; wanted 0"),
        ({"random_resized_crop": (0.9, 0.3), "crop_padding": 0}, "least share of the area first"),
        ({"random_resized_crop": (0, 0.3), "crop_padding": 0}, "greater than 0"),
        ({"rotation": 3}, "unknown key"),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        AugmentConfig(**settings)


def test_settings_read_back_equal():
    config = AugmentConfig(crop_padding=0, random_resized_crop=(0.25, 1))
    assert AugmentConfig.model_validate_json(config.model_dump_json()) == config
