import pytest
import torch
from torch import Tensor

from soteacher.data.augment import AugmentConfig, apply_views, draw_views
from soteacher.data.dataset import ImageSplit
from soteacher.data.loader import TrainLoader
from soteacher.data.strong import apply_changes, draw_changes
from soteacher.types import Batch, View

ALL: tuple[View, ...] = ("rotated", "second", "strong")
AUGMENT = AugmentConfig(crop_padding=2)
PLAIN = AugmentConfig(crop_padding=0, horizontal_flip=False)


def _split(count: int = 23) -> ImageSplit:
    random = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=random, dtype=torch.uint8)
    return ImageSplit(images=images, labels=torch.randint(0, 4, (count,), generator=random))


def _loader(*views: View, augment: AugmentConfig = AUGMENT, batch_size: int = 5, seed: int = 0) -> TrainLoader:
    return TrainLoader(_split(), batch_size=batch_size, augment=augment, seed=seed, device="cpu", views=views)


def _epoch(loader: TrainLoader, view: View, epoch: int = 0) -> Tensor:
    """Return a view of all images in the order of the training set."""
    batches = list(loader.epoch(epoch))
    order = torch.cat([batch.indices for batch in batches]).argsort()
    return torch.cat([batch.views[view] for batch in batches])[order]


def _equal(one: Batch, other: Batch) -> bool:
    return torch.equal(one.images, other.images) and all(
        torch.equal(one.views[view], other.views[view]) for view in one.views.keys() | other.views.keys()
    )


def test_there_are_no_views_unless_they_are_asked_for() -> None:
    assert next(iter(_loader().epoch(0))).views == {}
    for view in ALL:
        assert set(next(iter(_loader(view).epoch(0))).views) == {view}


def test_views_leave_the_images_as_they_are_without() -> None:
    plain, viewed = (list(_loader(*views).epoch(2)) for views in ((), ALL))
    assert all(torch.equal(one.images, other.images) for one, other in zip(plain, viewed, strict=True))
    assert all(torch.equal(one.indices, other.indices) for one, other in zip(plain, viewed, strict=True))


@pytest.mark.parametrize("view", ALL)
def test_a_view_is_the_same_whichever_others_there_are(view: View) -> None:
    alone, together = next(iter(_loader(view).epoch(1))), next(iter(_loader(*ALL).epoch(1)))
    assert torch.equal(alone.views[view], together.views[view])


def test_the_second_view_is_another_draw_of_the_same_augmentation() -> None:
    loader, split = _loader("second"), _split()
    for batch in loader.epoch(0):
        second = batch.views["second"]
        assert second.shape == batch.images.shape
        assert second.dtype == torch.float32
        different = (second != batch.images).flatten(1).any(1)
        assert different.float().mean() > 0.6
        for image, row in zip(second, batch.indices.tolist(), strict=True):
            padded = torch.nn.functional.pad(split.images[row] / 255, (2, 2, 2, 2))
            crops = [padded[:, top : top + 8, left : left + 8] for top in range(5) for left in range(5)]
            assert any(torch.equal(image, crop) or torch.equal(image, crop.flip(-1)) for crop in crops)


@pytest.mark.parametrize("view", ["second", "strong"])
def test_a_view_is_drawn_anew_in_each_epoch_and_by_each_seed(view: View) -> None:
    first = _epoch(_loader(view), view, 0)
    assert torch.equal(first, _epoch(_loader(view), view, 0))
    assert not torch.equal(first, _epoch(_loader(view), view, 1))
    assert not torch.equal(first, _epoch(_loader(view, seed=1), view, 0))


@pytest.mark.parametrize("view", ["second", "strong"])
def test_a_view_does_not_depend_on_the_batch_size(view: View) -> None:
    one, other = (_epoch(_loader(view, batch_size=size), view, 0) for size in (4, 23))
    torch.testing.assert_close(one, other)


def test_without_augmentation_the_second_view_is_the_image() -> None:
    for batch in _loader("second", augment=PLAIN).epoch(0):
        assert torch.equal(batch.views["second"], batch.images)


def test_the_strong_view_is_the_augmentation_and_two_changes() -> None:
    from soteacher.randomness import generator

    views = draw_views(AUGMENT, 23, generator(0, "strong", 3), 8)
    changes = draw_changes(23, generator(0, "strong changes", 3))
    wanted = apply_changes(apply_views(_split().images, views, AUGMENT), changes)
    torch.testing.assert_close(_epoch(_loader("strong"), "strong", 3), wanted)
    assert wanted.min() >= 0
    assert wanted.max() <= 1


def test_the_draws_of_the_views_are_not_one_another() -> None:
    batch = next(iter(_loader("second", "strong", batch_size=23).epoch(0)))
    assert not torch.equal(batch.views["second"], batch.views["strong"])
    assert not torch.equal(batch.views["strong"], batch.images)


def test_the_rotated_view_holds_all_of_90_degrees_first() -> None:
    for batch in _loader("rotated").epoch(0):
        turned = batch.views["rotated"].reshape(3, *batch.images.shape)
        for number, image in enumerate(batch.images):
            quarter = torch.stack([channel.T.flip(0) for channel in image])  # the last column becomes the first row
            assert torch.equal(turned[0, number], quarter)
            assert torch.equal(turned[1, number], image.flip(1, 2))
            assert torch.equal(turned[2, number], quarter.flip(1, 2))


@pytest.mark.parametrize("start", [0, 2, 4, 5])
@pytest.mark.parametrize("augment", [AUGMENT, AugmentConfig(crop_padding=0, random_resized_crop=(0.3, 1))])
def test_an_epoch_resumed_at_any_batch_has_the_same_views(start: int, augment: AugmentConfig) -> None:
    unbroken = list(_loader(*ALL, augment=augment).epoch(3))
    resumed = list(_loader(*ALL, augment=augment).epoch(3, start=start))
    assert len(resumed) == 5 - start
    assert all(_equal(one, other) for one, other in zip(unbroken[start:], resumed, strict=True))


def test_views_leave_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    list(_loader(*ALL).epoch(0))
    assert torch.equal(before, torch.get_rng_state())
