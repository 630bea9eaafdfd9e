"""Any images in one ``.npz`` file of arrays."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from soteacher.data.dataset import DataSet, ImageSplit
from soteacher.data.download import Progress
from soteacher.data.reason import reason
from soteacher.data.source import SourceConfig
from soteacher.errors import InputError

Arrays = dict[str, np.ndarray[Any, Any]]
_REQUIRED = ("train_images", "train_labels", "test_images", "test_labels")
_NAMES = ("label_names", "class_names")


class NpzConfig(SourceConfig):
    """A NumPy file with the arrays ``train_images``, ``train_labels``, ``test_images`` and ``test_labels``.

    Images are square: ``[N, H, W]`` or ``[N, H, W, C]`` with 1 or 3 channels, uint8, or floating point in [0, 1].
    Labels are integers ``[N]`` from 0. ``label_names`` (or ``class_names``), an array of text, names the classes;
    without it the classes are those of the training labels, and each needs an example there.
    """

    source: Literal["npz"] = "npz"
    """Chooses this source."""
    path: Path
    """The file."""

    def load(self, root: Path, *, progress: Progress | None = None) -> DataSet:
        """Read the data; see :meth:`SourceConfig.load`."""
        del root, progress
        path = self.path.expanduser()
        arrays = read_arrays(path)
        names = class_names(arrays, path)
        train = split_of(arrays, "train", num_classes=len(names), path=path)
        test = split_of(arrays, "test", num_classes=len(names), path=path)
        return self.finish(
            path.stem,
            train=self.subset(train, field="train_examples"),
            test=self.subset(test, field="test_examples"),
            class_names=names,
        )


def read_arrays(path: Path) -> Arrays:
    """Return the arrays that data consist of.

    Raises:
        InputError: the file is missing, damaged or of another kind, or lacks arrays.
    """
    if not path.is_file():
        raise InputError(f"npz file {path} does not exist")
    try:
        with path.open("rb") as opened:  # np.load leaves a file open that it cannot read
            file = np.load(opened, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise InputError("it holds a single array, wanted an .npz file")
            missing = [name for name in _REQUIRED if name not in file.files]
            if missing:
                raise InputError(f"it has no array {', '.join(missing)}; it has {', '.join(file.files) or 'none'}")
            return {name: file[name] for name in (*_REQUIRED, *_NAMES) if name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"cannot read {path}: {reason(error)}") from error


def class_names(arrays: Arrays, path: Path) -> tuple[str, ...]:
    """Return the classes' names, or their numbers where the file names none.

    Raises:
        InputError: the names are no text or too few, or a class that has no name has no training example either.
    """
    for key in _NAMES:
        if key in arrays:
            names = arrays[key]
            if names.ndim != 1 or names.dtype.kind not in "US" or len(names) < 2:
                raise InputError(
                    f"{key} of {path} is {_described(names)}; wanted text of shape [K] for 2 or more classes"
                )
            return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names.tolist())
    labels = _labels_of(arrays, "train", path)
    present = labels.unique().tolist()
    absent = sorted(set(range(present[-1] + 1)) - set(present))
    if absent:
        raise InputError(f"train_labels of {path} has no example of class {absent[0]} among 0 to {present[-1]}")
    if len(present) < 2:
        raise InputError(f"train_labels of {path} has one class only; wanted 2 or more")
    return tuple(map(str, present))


def split_of(arrays: Arrays, split: str, *, num_classes: int, path: Path) -> ImageSplit:
    """Return the images and labels of ``"train"`` or ``"test"``.

    Raises:
        InputError: shapes, types or values are not those that :class:`NpzConfig` wants.
    """
    images, labels = _images_of(arrays, split, path), _labels_of(arrays, split, path)
    if len(labels) != len(images):
        raise InputError(f"{split}_labels of {path} has {len(labels)} labels for {len(images)} images")
    if labels.max() >= num_classes:
        raise InputError(f"{split}_labels of {path} has label {int(labels.max())}; wanted 0 to {num_classes - 1}")
    return ImageSplit(images=images, labels=labels)


def _images_of(arrays: Arrays, split: str, path: Path) -> Tensor:
    name = f"{split}_images"
    images = arrays[name]
    square = images.ndim in (3, 4) and images.shape[1] == images.shape[2] and images.size > 0
    if not square or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise InputError(
            f"{name} of {path} is {_described(images)}; wanted [N, H, W] or [N, H, W, C], square, of 1 or 3 channels"
        )
    if images.dtype.kind == "f":
        if not np.isfinite(images).all():
            raise InputError(f"{name} of {path} has values that are not finite")
        if images.min() < 0 or images.max() > 1:
            raise InputError(f"{name} of {path} ranges from {images.min():g} to {images.max():g}; wanted 0 to 1")
        images = images.astype(np.float32)
    elif images.dtype != np.uint8:
        raise InputError(f"{name} of {path} is {_described(images)}; wanted uint8, or floating point in [0, 1]")
    if images.ndim == 3:
        images = images[..., None]
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def _labels_of(arrays: Arrays, split: str, path: Path) -> Tensor:
    labels = arrays[f"{split}_labels"]
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
        raise InputError(f"{split}_labels of {path} is {_described(labels)}; wanted integers of shape [N]")
    if labels.min() < 0:
        raise InputError(f"{split}_labels of {path} has label {labels.min()}; wanted integers from 0")
    return torch.from_numpy(labels.astype(np.int64))


def _described(array: np.ndarray[Any, Any]) -> str:
    return f"{array.dtype} of shape {list(array.shape)}"
