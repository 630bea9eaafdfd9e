from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from soteacher.data.strong import CHANGES_PER_IMAGE, Changes, apply_changes, draw_changes

NAMES = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "saturation", "contrast",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
STRENGTH = 9 / 30


@cache
def _images(channels: int = 3) -> Tensor:
    """Four images of eight-bit values, which PIL knows exactly."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(30, 220, (4, channels, 16, 16), generator=generator)
    images[:, :, 4:12, 4:12] += 30  # something to move
    return images / 255


def _changed(images: Tensor, *kinds: int, backwards: bool = False) -> Tensor:
    """Return images that all undergo the given changes."""
    picked = torch.tensor((*kinds, *[0] * (CHANGES_PER_IMAGE - len(kinds))))
    changes = Changes(
        kinds=picked.expand(len(images), -1), backwards=torch.full((len(images), CHANGES_PER_IMAGE), backwards)
    )
    return apply_changes(images, changes)


def _pil(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]


def _tensor(images: list[Image.Image]) -> Tensor:
    return torch.stack([torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255 for image in images])


PIL_CHANGES: dict[str, Any] = {  # of a direction, 1 or -1
    "identity": lambda image, _: image,
    "brightness": lambda image, way: ImageEnhance.Brightness(image).enhance(1 + way * 0.9 * STRENGTH),
    "saturation": lambda image, way: ImageEnhance.Color(image).enhance(1 + way * 0.9 * STRENGTH),
    "contrast": lambda image, way: ImageEnhance.Contrast(image).enhance(1 + way * 0.9 * STRENGTH),
    "sharpness": lambda image, way: ImageEnhance.Sharpness(image).enhance(1 + way * 0.9 * STRENGTH),
    "posterize": lambda image, _: ImageOps.posterize(image, 8 - round(4 * STRENGTH)),
    "solarize": lambda image, _: ImageOps.solarize(image, round(255 * (1 - STRENGTH)) + 1),
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
}


@pytest.mark.parametrize("way", [1, -1])
@pytest.mark.parametrize("name", PIL_CHANGES)
def test_changes_of_colour_are_those_of_pillow(name: str, way: int) -> None:
    images = _images()
    found = _changed(images, NAMES.index(name), backwards=way < 0)
    wanted = _tensor([PIL_CHANGES[name](image, way) for image in _pil(images)])
    # Pillow rounds to eight bits, sometimes twice; sharpness differs more, in pixels at which Pillow's filter rounds.
    torch.testing.assert_close(found, wanted, rtol=0, atol=2.01 / 255)
    least = {"identity": 0.0, "posterize": 0.003}.get(name, 0.05)
    assert (found - images).abs().max() >= least


@pytest.mark.parametrize("way", [1, -1])
@pytest.mark.parametrize("name", ["shear_x", "shear_y", "translate_x", "translate_y", "rotate"])
def test_changes_of_place_are_those_by_hand(name: str, way: int) -> None:
    """Each output pixel is the input pixel that the map says, the nearest one; black where there is none."""
    images, size = _images(), 16
    found = _changed(images, NAMES.index(name), backwards=way < 0)
    slope, pixels = way * 0.3 * STRENGTH, way * int(150 / 331 * STRENGTH * size)
    angle = np.deg2rad(way * 30 * STRENGTH)
    wanted = torch.zeros_like(images)
    unsure = torch.zeros(size, size, dtype=torch.bool)  # half-way between two pixels
    for row in range(size):
        for column in range(size):
            x, y = column + 0.5, row + 0.5
            if name == "shear_x":
                x = x + slope * y
            elif name == "shear_y":
                y = y + slope * x
            elif name == "translate_x":
                x = x - pixels
            elif name == "translate_y":
                y = y - pixels
            else:
                x, y = x - size / 2, y - size / 2
                x, y = np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y
                x, y = x + size / 2, y + size / 2
            i, j = int(np.floor(y)), int(np.floor(x))
            unsure[row, column] = bool(min(abs(x - round(x)), abs(y - round(y))) < 1e-3)
            if 0 <= i < size and 0 <= j < size:
                wanted[:, :, row, column] = images[:, :, i, j]
    right = (found == wanted).all(1).all(0)
    assert unsure.sum() < 40
    assert right[~unsure].all(), (~right & ~unsure).nonzero()
    assert (found - images).abs().max() > 0.05


def test_the_ways_are_opposite() -> None:
    images = torch.full((1, 3, 16, 16), 0.5)
    brighter, darker = (_changed(images, NAMES.index("brightness"), backwards=way) for way in (False, True))
    assert brighter.mean() == pytest.approx(0.5 * 1.27)
    assert darker.mean() == pytest.approx(0.5 * 0.73)
    right, left = (_changed(_images(), NAMES.index("translate_x"), backwards=way) for way in (False, True))
    assert torch.equal(right[..., 2:], _images()[..., :-2])
    assert torch.equal(left[..., :-2], _images()[..., 2:])
    assert right[..., :2].abs().max() == left[..., -2:].abs().max() == 0


def test_two_changes_come_one_after_the_other() -> None:
    images = _images()
    for first, second in (("translate_x", "brightness"), ("solarize", "rotate"), ("contrast", "contrast")):
        one = _changed(_changed(images, NAMES.index(first)), NAMES.index(second))
        torch.testing.assert_close(_changed(images, NAMES.index(first), NAMES.index(second)), one)


def test_every_image_undergoes_its_own_changes() -> None:
    images = _images().repeat(14, 1, 1, 1)
    changes = draw_changes(len(images), torch.Generator().manual_seed(3))
    together = apply_changes(images, changes)
    for row in range(len(images)):
        rows = torch.tensor([row])
        torch.testing.assert_close(together[rows], apply_changes(images[rows], changes.select(rows)))


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_all_changes_stay_in_range_and_leave_their_input(channels: int) -> None:
    images = torch.rand(2, channels, 12, 12, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    for kind in range(len(NAMES)):
        for backwards in (False, True):
            found = _changed(images, kind, backwards=backwards)
            assert found.shape == images.shape
            assert found.dtype == images.dtype
            assert found.min() >= 0
            assert found.max() <= 1
    assert torch.equal(images, before)


@pytest.mark.parametrize("channels", [1, 2])
def test_saturation_is_of_colours_only(channels: int) -> None:
    images = torch.rand(2, channels, 12, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(_changed(images, NAMES.index("saturation")), images)
    assert not torch.equal(_changed(images, NAMES.index("rotate")), images)


def test_an_image_of_one_value_stays_one() -> None:
    images = torch.full((1, 3, 12, 12), 0.25)
    for name in ("autocontrast", "equalize", "contrast", "sharpness", "saturation"):
        found = _changed(images, NAMES.index(name))
        torch.testing.assert_close(found, images, rtol=0, atol=1.01 / 255, msg=name)  # equalize rounds to eight bits


def test_draws_follow_from_the_generator_and_take_every_change_alike() -> None:
    draws = [draw_changes(7000, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0].kinds, draws[1].kinds)
    assert torch.equal(draws[0].backwards, draws[1].backwards)
    assert not torch.equal(draws[0].kinds, draws[2].kinds)
    kinds, backwards = draws[0].kinds, draws[0].backwards
    assert kinds.shape == backwards.shape == (7000, 2)
    counts = kinds.flatten().bincount(minlength=len(NAMES))
    assert len(counts) == len(NAMES)
    assert (counts - 1000).abs().max() < 6 * 1000**0.5
    assert backwards.float().mean() == pytest.approx(0.5, abs=0.02)
    assert (kinds[:, 0] == kinds[:, 1]).float().mean() == pytest.approx(1 / 14, abs=0.02)


def test_draws_leave_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    apply_changes(_images(), draw_changes(4, torch.Generator().manual_seed(0)))
    assert torch.equal(before, torch.get_rng_state())


def test_images_of_other_channels_change_channel_by_channel() -> None:
    images = torch.rand(2, 5, 12, 12, generator=torch.Generator().manual_seed(0))
    for name in ("brightness", "contrast", "sharpness", "autocontrast", "equalize", "solarize"):
        apart = torch.cat([_changed(channel, NAMES.index(name)) for channel in images.split(1, dim=1)], 1)
        torch.testing.assert_close(_changed(images, NAMES.index(name)), apart, msg=name)
        assert not torch.equal(apart, images)
