"""Photographs in folders, one folder a class."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from soteacher.data.dataset import DataSet, ImageSplit, channel_statistics, class_balanced_subset
from soteacher.data.download import Progress
from soteacher.data.folder_images import FolderImages
from soteacher.data.source import SUBSET_SEED, SourceConfig
from soteacher.errors import InputError

MEMORY_LIMIT_BYTES = 2 << 30
"""Up to here decoded images are kept in memory unless the settings say otherwise."""
STATISTICS_EXAMPLES = 10_000
"""Mean and standard deviation are taken of at most so many training images, class-balanced."""


class FolderConfig(SourceConfig):
    """Images in ``PATH/train/CLASS/`` and ``PATH/test/CLASS/`` (or ``val``), of any size and format that Pillow reads.

    Each image becomes a square RGB image: the camera's orientation is applied, the shorter side is scaled to
    ``image_size``, and the square in the middle is cut out; what lies outside it is lost. Files in folders within a
    class folder belong to it; hidden files and those whose names do not end like an image's are left alone. Mean and
    std are computed from the training images, or from 10,000 of them where there are more.
    """

    source: Literal["folder"] = "folder"
    """Chooses this source."""
    path: Path
    """The folder."""
    test_folder: Literal["test", "val"] | None = None
    """Which folder is the test split; None: the one that is there, which must be one only."""
    image_size: int = Field(default=64, ge=8, le=4096)
    """Height and width that images are brought to, in pixels."""
    in_memory: bool | None = None
    """Decode all images once and keep them in memory, or anew in every epoch; None: in memory if that takes 2 GiB or
    less. The batches are the same."""
    skip_unreadable: bool = False
    """Leave out images that cannot be read, for which all are read when the set is loaded; otherwise they are an
    error."""

    def load(self, root: Path, *, progress: Progress | None = None) -> DataSet:
        """Read the data; see :meth:`SourceConfig.load`."""
        del root
        path = self.path.expanduser().absolute()
        train_folder, test_folder = path / "train", path / self._test_name(path)
        names = class_folders(train_folder)
        _same_classes(names, train_folder, class_folders(test_folder), test_folder)
        train, skipped_train = self._list(train_folder, names, progress)
        test, skipped_test = self._list(test_folder, names, progress)
        train, test = self.subset(train, field="train_examples"), self.subset(test, field="test_examples")
        if self._fits(train.num_examples + test.num_examples):
            train, test = _decoded(train, progress), _decoded(test, progress)
        statistics = None if self.mean is not None and self.std is not None else _statistics(train)
        return self.finish(
            path.name,
            train=train,
            test=test,
            class_names=names,
            statistics=statistics,
            skipped=skipped_train + skipped_test,
        )

    def _test_name(self, path: Path) -> str:
        if not path.is_dir():
            raise InputError(f"image folder {path} does not exist")
        if self.test_folder is not None:
            return self.test_folder
        present = [name for name in ("test", "val") if (path / name).is_dir()]
        if not present:
            raise InputError(f"{path} has no folder test or val; wanted train and one of them")
        if len(present) > 1:
            raise InputError(f"{path} has both folders test and val; set test_folder to one of them")
        return present[0]

    def _list(
        self, folder: Path, names: tuple[str, ...], progress: Progress | None
    ) -> tuple[ImageSplit, tuple[Path, ...]]:
        """Return a split's files and those left out of it."""
        images, labels = list_images(folder, names, self.image_size)
        skipped = images.unreadable(progress) if self.skip_unreadable else ()
        keep = torch.ones(len(images), dtype=torch.bool)
        keep[list(skipped)] = False
        rows = keep.nonzero().flatten()
        empty = set(range(len(names))) - set(labels[rows].tolist())
        if empty:
            raise InputError(f"class folder {folder / names[min(empty)]} has no image that can be read")
        split = ImageSplit(images=images, labels=labels).subset(rows)
        return split, tuple(folder / images.files[row] for row in skipped)

    def _fits(self, num_images: int) -> bool:
        if self.in_memory is not None:
            return self.in_memory
        return num_images * 3 * self.image_size**2 <= MEMORY_LIMIT_BYTES


def class_folders(folder: Path) -> tuple[str, ...]:
    """Return the names of a split's classes, sorted.

    Raises:
        InputError: the folder does not exist or has fewer than two class folders.
    """
    if not folder.is_dir():
        raise InputError(f"folder {folder} does not exist")
    names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."))
    if len(names) < 2:
        had = f"only the class folder {names[0]}" if names else "no class folder"
        raise InputError(f"{folder} has {had}; wanted a folder for each of 2 or more classes")
    return names


def list_images(folder: Path, names: tuple[str, ...], image_size: int) -> tuple[FolderImages, Tensor]:
    """Return a split's image files in the order of classes and names, and their labels.

    Raises:
        InputError: a class folder holds no image.
    """
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = [path for path in (folder / name).rglob("*") if _is_image(path, folder, suffixes)]
        if not found:
            raise InputError(f"class folder {folder / name} holds no image")
        paths += sorted(found, key=lambda path: path.relative_to(folder).as_posix())
        labels += [label] * len(found)
    images = FolderImages(
        folder=folder,
        files=tuple(path.relative_to(folder).as_posix() for path in paths),
        num_bytes=tuple(path.stat().st_size for path in paths),
        image_size=image_size,
    )
    return images, torch.tensor(labels, dtype=torch.int64)


def _is_image(path: Path, folder: Path, suffixes: set[str]) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return not hidden and path.suffix.lower() in suffixes and path.is_file()


def _same_classes(train: tuple[str, ...], train_folder: Path, test: tuple[str, ...], test_folder: Path) -> None:
    for names, folder, others in ((train, test_folder, test), (test, train_folder, train)):
        missing = sorted(set(names) - set(others))
        if missing:
            raise InputError(f"{folder} lacks classes that the other split has: {', '.join(missing)}")


def _decoded(split: ImageSplit, progress: Progress | None) -> ImageSplit:
    if isinstance(split.images, Tensor):
        return split
    return ImageSplit(images=split.images.decode(progress), labels=split.labels)


def _statistics(train: ImageSplit) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std of the same images whether they are in memory or not."""
    if train.num_examples <= STATISTICS_EXAMPLES:
        return channel_statistics(train)
    return channel_statistics(train.subset(class_balanced_subset(train.labels, STATISTICS_EXAMPLES, SUBSET_SEED)))
