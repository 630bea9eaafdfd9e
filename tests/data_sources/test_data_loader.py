import pytest
import torch

from soteacher.data.augment import AugmentConfig
from soteacher.data.dataset import ImageSplit
from soteacher.data.loader import EvaluationLoader, TrainLoader
from soteacher.errors import InputError
from soteacher.types import Batch

DEFAULT = AugmentConfig()
PLAIN = AugmentConfig(crop_padding=0, horizontal_flip=False)


def _split(count: int = 23) -> ImageSplit:
    random = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=random, dtype=torch.uint8)
    return ImageSplit(images=images, labels=torch.randint(0, 4, (count,), generator=random))


def _loader(augment: AugmentConfig = DEFAULT, *, batch_size: int = 5, seed: int = 0) -> TrainLoader:
    return TrainLoader(_split(), batch_size=batch_size, augment=augment, seed=seed, device="cpu")


def _same(one: Batch, other: Batch) -> bool:
    return (
        torch.equal(one.images, other.images)
        and torch.equal(one.labels, other.labels)
        and torch.equal(one.indices, other.indices)
    )


def test_an_epoch_holds_every_example_once_with_its_image_and_label():
    split, loader = _split(), _loader(PLAIN)
    batches = list(loader.epoch(0))
    assert [len(batch.labels) for batch in batches] == [5, 5, 5, 5, 3]
    assert loader.steps_per_epoch == 5
    assert loader.num_examples == 23
    rows = torch.cat([batch.indices for batch in batches])
    assert rows.sort().values.tolist() == list(range(23))
    assert not torch.equal(rows, torch.arange(23))
    for batch in batches:
        assert torch.equal(batch.images, split.images[batch.indices] / 255)
        assert torch.equal(batch.labels, split.labels[batch.indices])


@pytest.mark.parametrize("start", [0, 2, 4, 5])
@pytest.mark.parametrize("augment", [AugmentConfig(), AugmentConfig(crop_padding=0, random_resized_crop=(0.3, 1))])
def test_an_epoch_can_start_at_any_batch(start, augment):
    unbroken = list(_loader(augment).epoch(3))
    resumed = list(_loader(augment).epoch(3, start=start))
    assert len(resumed) == 5 - start
    assert all(_same(one, other) for one, other in zip(unbroken[start:], resumed, strict=True))


def test_epochs_and_seeds_differ_and_repeat():
    loader = _loader()
    first = [next(iter(loader.epoch(epoch))) for epoch in (0, 1)] + [next(iter(_loader(seed=1).epoch(0)))]
    assert not _same(first[0], first[1])
    assert not _same(first[0], first[2])
    assert _same(first[0], next(iter(loader.epoch(0))))


def test_a_view_does_not_depend_on_the_batch_size():
    views = []
    for batch_size in (4, 23):
        batches = list(_loader(batch_size=batch_size).epoch(0))
        order = torch.cat([batch.indices for batch in batches]).argsort()
        views.append(torch.cat([batch.images for batch in batches])[order])
    assert torch.equal(*views)


def test_loading_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    list(_loader().epoch(0))
    assert torch.equal(before, torch.get_rng_state())


def test_float_images_pass_unscaled():
    images = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    split = ImageSplit(images=images, labels=torch.zeros(6, dtype=torch.int64))
    (batch,) = EvaluationLoader(split, batch_size=10, device="cpu")
    assert torch.equal(batch.images, images)
    (batch,) = TrainLoader(split, batch_size=10, augment=AugmentConfig(), seed=0, device="cpu").epoch(0)
    assert batch.images.max() <= 1


def test_evaluation_is_in_order_and_can_be_repeated():
    split = _split()
    loader = EvaluationLoader(split, batch_size=10, device="cpu")
    assert loader.num_examples == 23
    for _ in range(2):
        batches = list(loader)
        assert [len(batch.labels) for batch in batches] == [10, 10, 3]
        assert torch.equal(torch.cat([batch.images for batch in batches]), split.images / 255)
        assert torch.equal(torch.cat([batch.indices for batch in batches]), torch.arange(23))
        assert torch.equal(torch.cat([batch.labels for batch in batches]), split.labels)


@pytest.mark.parametrize(("batch_size", "workers", "words"), [(0, 0, "batch_size is 0"), (1, -1, "workers is -1")])
def test_impossible_settings_are_refused(batch_size, workers, words):
    with pytest.raises(InputError, match=words):
        EvaluationLoader(_split(), batch_size=batch_size, device="cpu", workers=workers)


@pytest.mark.gpu
def test_batches_are_the_same_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    on_gpu = TrainLoader(_split(), batch_size=5, augment=AugmentConfig(), seed=0, device="cuda")
    for one, other in zip(on_gpu.epoch(0), _loader().epoch(0), strict=True):
        assert torch.equal(one.indices.cpu(), other.indices)
        torch.testing.assert_close(one.images.cpu(), other.images, atol=1e-6, rtol=0)
