"""What every source of data gives: images and labels of a training and a test split, and facts about them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor

from soteacher.data.folder_images import FolderImages
from soteacher.errors import InputError
from soteacher.randomness import generator


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageSplit:
    """Labelled images, in memory or as files that are decoded when they are needed."""

    images: Tensor | FolderImages
    """``[N, C, H, W]`` uint8, or float32 in [0, 1]; or the files that hold N RGB images."""
    labels: Tensor
    """``[N]`` int64 class ids."""
    label_distribution: Tensor | None = None
    """``[N, K]`` float32: how the label of each image is truly distributed, or what people said; ``None`` where that is
    not known. No training sees it."""
    clean_labels: Tensor | None = None
    """``[N]`` int64: the right labels, where ``labels`` are not; ``None`` where ``labels`` count as right."""

    @property
    def num_examples(self) -> int:
        """Number of images, N."""
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        if isinstance(self.images, FolderImages):
            return (3, self.images.image_size, self.images.image_size)
        _, channels, height, width = self.images.shape
        return (channels, height, width)

    def subset(self, rows: Tensor) -> ImageSplit:
        """Return the split that holds the given rows, in their order."""
        images = self.images.select(rows.tolist()) if isinstance(self.images, FolderImages) else self.images[rows]
        return ImageSplit(
            images=images,
            labels=self.labels[rows],
            label_distribution=None if self.label_distribution is None else self.label_distribution[rows],
            clean_labels=None if self.clean_labels is None else self.clean_labels[rows],
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DataSet:
    """A training and a test split of labelled square images."""

    name: str
    train: ImageSplit
    test: ImageSplit
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    """By channel, of images in [0, 1]; what networks subtract."""
    std: tuple[float, ...]
    """By channel, of images in [0, 1], positive; what networks divide by."""
    checksum: str
    """Digest of the images and labels in use; of streamed images, their files' names and sizes stand for them."""
    skipped: tuple[Path, ...] = ()
    """Image files that could not be read and were left out."""

    @property
    def num_classes(self) -> int:
        """Number of classes, K."""
        return len(self.class_names)

    @property
    def in_channels(self) -> int:
        """Channels of every image: 1 or 3."""
        return self.train.image_shape[0]

    @property
    def image_size(self) -> int:
        """Height and width of every image, in pixels."""
        return self.train.image_shape[1]


def class_balanced_subset(labels: Tensor, count: int, seed: int) -> Tensor:
    """Return sorted rows of a random subset in which the classes are as equally frequent as they can be.

    Subsets of one seed are nested: that of a smaller count lies within that of a larger one. A class with fewer
    examples than its share is taken whole and the others fill up.

    Args:
        labels: ``[N]`` class ids.
        count: size of the subset, in 1..N.
        seed: of the draw.

    Returns:
        ``[count]`` int64, ascending.

    Raises:
        InputError: ``count`` is not in 1..N.
    """
    num_examples = len(labels)
    if not 1 <= count <= num_examples:
        raise InputError(f"a subset of {count} examples was asked for; wanted 1 to {num_examples}")
    shuffled = torch.randperm(num_examples, generator=generator(seed, "subset"))
    by_class = labels[shuffled].argsort(stable=True)
    class_sizes = torch.bincount(labels)
    class_starts = class_sizes.cumsum(0) - class_sizes
    rank_in_class = torch.empty(num_examples, dtype=torch.int64)
    rank_in_class[by_class] = torch.arange(num_examples) - class_starts[labels[shuffled[by_class]]]
    # Every class gives its first example before any gives its second; the shuffle decides among equals.
    chosen = rank_in_class.argsort(stable=True)[:count]
    return shuffled[chosen].sort().values


def held_out_rows(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split examples at random into those to train on and those to hold out, each class by the same share.

    Args:
        labels: ``[N]`` class ids.
        share: of the examples of each class that are held out, in (0, 1); rounded, and one is always left to train on.
        seed: of the draw.

    Returns:
        The rows to train on and the rows held out, both ascending int64.

    Raises:
        InputError: no class has enough examples for one to be held out.
    """
    shuffled = torch.randperm(len(labels), generator=generator(seed, "held out"))
    held: list[Tensor] = []
    for label in labels.unique():
        rows = shuffled[labels[shuffled] == label]
        held.append(rows[: min(int(share * len(rows) + 0.5), len(rows) - 1)])
    out = torch.cat(held).sort().values
    if not len(out):
        raise InputError(f"held_out is {share:g}, and no class has enough of the {len(labels)} examples to give one")
    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[out] = False
    return kept.nonzero().flatten(), out


def checksum_of(*splits: ImageSplit) -> str:
    """Return a hexadecimal digest (BLAKE2b, 128 bits) of images, their shapes and their labels."""
    digest = blake2b(digest_size=16)
    for split in splits:
        if isinstance(split.images, FolderImages):
            digest.update(f"files {split.images.image_size}\n".encode())
            for name, num_bytes in zip(split.images.files, split.images.num_bytes, strict=True):
                digest.update(f"{name}\0{num_bytes}\n".encode())
        else:
            digest.update(f"{split.images.dtype} {tuple(split.images.shape)}\n".encode())
            digest.update(split.images.contiguous().numpy().data)
        digest.update(split.labels.contiguous().numpy().data)
    return digest.hexdigest()


def channel_statistics(split: ImageSplit) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of every channel over all pixels, of images scaled to [0, 1].

    Of uint8 images they are computed from exact counts, so that they do not depend on the order of the images.
    """
    if isinstance(split.images, Tensor) and split.images.is_floating_point():
        by_channel = split.images.transpose(0, 1).flatten(1).double()
        return tuple(by_channel.mean(1).tolist()), tuple(by_channel.std(1, correction=0).tolist())
    counts = torch.zeros(split.image_shape[0], 256, dtype=torch.int64)
    for chunk in _chunks(split.images):
        for channel in range(len(counts)):
            counts[channel] += torch.bincount(chunk[:, channel].flatten(), minlength=256)
    values = torch.arange(256, dtype=torch.float64) / 255
    shares = counts / counts.sum(1, keepdim=True)
    mean = (shares * values).sum(1)
    std = (shares * (values - mean[:, None]).square()).sum(1).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def _chunks(images: Tensor | FolderImages, size: int = 1024) -> Iterator[Tensor]:
    """Yield uint8 images in pieces that fit into memory."""
    for start in range(0, len(images), size):
        if isinstance(images, FolderImages):
            yield images.select(range(start, min(start + size, len(images)))).decode()
        else:
            yield images[start : start + size]
