"""Numbers of augmented views, and the keys that batches carry."""

from typing import Any

import pytest
import torch
from torch import Tensor

from soteacher.data.augment import AugmentConfig, Views
from soteacher.data.dataset import ImageSplit
from soteacher.data.loader import TrainLoader
from soteacher.data.view_numbers import draw_numbered_views, number_of_views
from soteacher.mixing import MixingConfig
from soteacher.randomness import generator
from soteacher.types import View

CIFAR = AugmentConfig()
RESIZED: dict[str, Any] = {"crop_padding": 0, "random_resized_crop": (0.2, 1.0)}
CROP = AugmentConfig(crop_padding=1)


def drawn(config: AugmentConfig, count: int, *, seed: int = 0, bank_seed: int = 0) -> tuple[Views, Tensor | None]:
    return draw_numbered_views(config, count, generator(seed, "draw"), 8, bank_seed=bank_seed)


def described(views: Views) -> list[tuple[Any, ...]]:
    """Return what is done to each image."""
    parts = [part.tolist() for part in (views.offsets, views.boxes, views.flips) if part is not None]
    return list(zip(*[map(str, part) for part in parts], strict=True))


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (CIFAR, 162),
        (AugmentConfig(horizontal_flip=False), 81),
        (AugmentConfig(crop_padding=1), 18),
        (AugmentConfig(crop_padding=0), 2),
        (AugmentConfig(view_bank=7), 7),
        (AugmentConfig(**RESIZED, view_bank=5), 5),
        (AugmentConfig(crop_padding=0, horizontal_flip=False), 1),
        (AugmentConfig(**RESIZED), None),
    ],
)
def test_views_are_counted(config: AugmentConfig, count: int | None) -> None:
    assert number_of_views(config) == count


@pytest.mark.parametrize("settings", [{}, {"horizontal_flip": False}, {"crop_padding": 1}, {"crop_padding": 0}])
def test_numbers_and_views_are_one_to_one(settings: dict[str, Any]) -> None:
    config = AugmentConfig(**settings)
    views, numbers = drawn(config, 6000)  # each of 162 views is among them
    assert numbers is not None
    assert numbers.dtype == torch.int64
    pairs = set(zip(described(views), numbers.tolist(), strict=True))
    count = number_of_views(config)
    assert len(pairs) == len({view for view, _ in pairs}) == count
    assert {number for _, number in pairs} == set(range(count or 0))


def test_the_only_view_is_number_0_and_endless_ones_have_none() -> None:
    numbers = drawn(AugmentConfig(crop_padding=0, horizontal_flip=False), 4)[1]
    assert numbers is not None
    assert numbers.tolist() == [0] * 4
    assert drawn(AugmentConfig(**RESIZED), 4)[1] is None


@pytest.mark.parametrize("settings", [RESIZED, {"crop_padding": 4}])
def test_a_bank_holds_so_many_views_of_each_image(settings: dict[str, Any]) -> None:
    config = AugmentConfig(**settings, view_bank=4)
    seen: list[dict[int, tuple[Any, ...]]] = [{} for _ in range(30)]
    for seed in range(40):  # each epoch draws with another one
        views, numbers = drawn(config, 30, seed=seed)
        assert numbers is not None
        for image, (number, view) in enumerate(zip(numbers.tolist(), described(views), strict=True)):
            assert seen[image].setdefault(number, view) == view
    assert all(set(bank) == set(range(4)) for bank in seen)
    # A bank may hold a view twice by chance; of 162, and of any number, it seldom does.
    assert sum(len(set(bank.values())) for bank in seen) > 30 * 4 * 0.9
    assert len({tuple(bank.values()) for bank in map(dict, map(sorted, map(dict.items, seen)))}) > 25  # not one for all
    views, numbers = drawn(config, 30, bank_seed=1)
    assert numbers is not None
    others = [seen[image][number] for image, number in enumerate(numbers.tolist())]
    assert sum(one != other for one, other in zip(described(views), others, strict=True)) > 25


def split_of(count: int = 23) -> ImageSplit:
    random = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=random, dtype=torch.uint8)
    return ImageSplit(images=images, labels=torch.randint(0, 4, (count,), generator=random))


def loader_of(augment: AugmentConfig, *, seed: int = 0, views: tuple[View, ...] = (), **over: Any) -> TrainLoader:
    return TrainLoader(split_of(), batch_size=5, augment=augment, seed=seed, device="cpu", views=views, **over)


def images_by_key(loader: TrainLoader, *, epochs: int, view: View | None = None) -> dict[int, Tensor]:
    """Return the image of each key, all of whose occurrences must be the same to the last bit."""
    found: dict[int, Tensor] = {}
    for epoch in range(epochs):
        for batch in loader.epoch(epoch):
            images = batch.images if view is None else batch.views[view]
            for key, image in zip(batch.keys[view].tolist(), images, strict=True):
                assert torch.equal(found.setdefault(key, image), image)
    return found


@pytest.mark.parametrize("view", [None, "second"])
@pytest.mark.parametrize("augment", [CROP, AugmentConfig(**RESIZED, view_bank=6), AugmentConfig(view_bank=6)])
def test_equal_keys_mean_equal_images(augment: AugmentConfig, view: View | None) -> None:
    loader = loader_of(augment, views=("second",))
    found = images_by_key(loader, epochs=60, view=view)
    count = number_of_views(augment) or 0
    assert set(found) <= set(range(23 * count))
    assert len(found) > 0.9 * 23 * count  # nearly all are met in so many epochs
    for key, image in images_by_key(loader, epochs=2).items():
        if key in found:  # the batch's own images and the second views have one numbering
            assert torch.equal(found[key], image)


def test_keys_are_the_images_rows_and_views() -> None:
    for batch in loader_of(CROP).epoch(3):
        assert batch.keys[None].dtype == torch.int64
        assert torch.equal(batch.keys[None] // 18, batch.indices)


def test_only_views_of_the_studys_augmentation_have_keys() -> None:
    views: tuple[View, ...] = ("second", "strong", "rotated")
    assert set(next(iter(loader_of(CROP, views=views).epoch(0))).keys) == {None, "second"}
    assert next(iter(loader_of(AugmentConfig(**RESIZED), views=views).epoch(0))).keys == {}
    mixed = loader_of(CROP, views=views, mixing=MixingConfig(name="mixup"))
    assert set(next(iter(mixed.epoch(0))).keys) == {"second"}  # a blended image is no view of one image


@pytest.mark.parametrize("start", [1, 3, 4])
@pytest.mark.parametrize("augment", [CROP, AugmentConfig(**RESIZED, view_bank=6)])
def test_keys_of_an_epoch_resumed_at_any_batch_are_those_of_the_whole(augment: AugmentConfig, start: int) -> None:
    loader = loader_of(augment, views=("second",))
    whole, resumed = list(loader.epoch(2))[start:], list(loader.epoch(2, start=start))
    assert len(whole) == len(resumed) == 5 - start
    for one, other in zip(whole, resumed, strict=True):
        assert one.keys.keys() == other.keys.keys() == {None, "second"}
        assert all(torch.equal(one.keys[view], other.keys[view]) for view in one.keys)
        assert torch.equal(one.images, other.images)


def test_held_out_rows_leave_the_keys_of_the_others_alone() -> None:
    rows = torch.tensor([2, 3, 5, 7, 11, 13, 17, 19, 22])
    whole = images_by_key(loader_of(CROP), epochs=60)
    part = images_by_key(loader_of(CROP, rows=rows), epochs=20)
    assert {key // 18 for key in part} == set(rows.tolist())
    shared = part.keys() & whole.keys()
    assert len(shared) > 0.8 * len(part)
    assert all(torch.equal(part[key], whole[key]) for key in shared)


def test_loaders_of_two_seeds_share_a_bank_by_its_seed() -> None:
    augment = AugmentConfig(**RESIZED, view_bank=3)
    one, other = (images_by_key(loader_of(augment, seed=seed, bank_seed=9), epochs=25) for seed in (0, 1))
    assert one.keys() == other.keys() == set(range(69))
    assert all(torch.equal(one[key], other[key]) for key in one)
    orders = [next(iter(loader_of(augment, seed=seed, bank_seed=9).epoch(0))).indices for seed in (0, 1)]
    assert not torch.equal(*orders)
    own = images_by_key(loader_of(augment, seed=0), epochs=25)
    assert sum(torch.equal(one[key], own[key]) for key in one) < 7
    same = images_by_key(loader_of(augment, seed=0, bank_seed=0), epochs=25)
    assert all(torch.equal(same[key], own[key]) for key in own)
