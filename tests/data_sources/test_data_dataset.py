import pytest
import torch

from soteacher.data.dataset import ImageSplit, channel_statistics, checksum_of, class_balanced_subset
from soteacher.errors import InputError


def _split(images: torch.Tensor) -> ImageSplit:
    return ImageSplit(images=images, labels=torch.arange(len(images)))


def test_subset_is_balanced_sorted_and_without_repeats():
    labels = torch.arange(7).repeat_interleave(30)[torch.randperm(210, generator=torch.Generator().manual_seed(0))]
    rows = class_balanced_subset(labels, 72, 5)
    assert torch.bincount(labels[rows]).tolist().count(10) == 5
    assert torch.bincount(labels[rows]).tolist().count(11) == 2
    assert (rows.diff() > 0).all()


def test_subset_depends_on_the_seed_alone_and_is_nested():
    labels = torch.arange(100) % 4
    small, large = class_balanced_subset(labels, 20, 1), class_balanced_subset(labels, 50, 1)
    assert torch.equal(small, class_balanced_subset(labels, 20, 1))
    assert set(small.tolist()) <= set(large.tolist())
    assert not torch.equal(small, class_balanced_subset(labels, 20, 2))


def test_subset_fills_up_where_a_class_is_small():
    labels = torch.tensor([0] * 2 + [1] * 20 + [2] * 20)
    assert torch.bincount(labels[class_balanced_subset(labels, 22, 0)]).tolist() == [2, 10, 10]
    assert torch.equal(class_balanced_subset(labels, 42, 0), torch.arange(42))


@pytest.mark.parametrize("count", [0, 5])
def test_subset_of_impossible_size_is_refused(count):
    with pytest.raises(InputError, match=f"subset of {count} examples.*1 to 4"):
        class_balanced_subset(torch.tensor([0, 1, 0, 1]), count, 0)


def test_split_subset_keeps_images_and_labels_together():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 2, 2)
    part = _split(images).subset(torch.tensor([3, 0]))
    assert part.labels.tolist() == [3, 0]
    assert part.images[:, 0, 0, 0].tolist() == [3, 0]
    assert part.num_examples == 2
    assert part.image_shape == (1, 2, 2)


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_channel_statistics_match_torch(kind):
    images = torch.randint(0, 256, (1500, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scaled = images.double() / 255
    mean, std = channel_statistics(_split(images if kind == "uint8" else scaled.float()))
    torch.testing.assert_close(torch.tensor(mean), scaled.mean((0, 2, 3)).float())
    torch.testing.assert_close(torch.tensor(std), scaled.std((0, 2, 3), correction=0).float())


def test_checksum_sees_every_pixel_label_and_shape():
    images = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    changed = images.clone()
    changed[3, 0, 1, 1] = 1
    labels = ImageSplit(images=images, labels=torch.tensor([0, 1, 2, 4]))
    sums = {checksum_of(split) for split in (_split(images), _split(changed), labels, _split(images.view(4, 1, 4, 1)))}
    assert len(sums) == 4
    assert checksum_of(_split(images)) == checksum_of(_split(images.clone()))
