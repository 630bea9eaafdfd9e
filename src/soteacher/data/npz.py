"""Any images in one ``.npz`` file of arrays."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
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
_OPTIONAL = (*_NAMES, "train_label_distribution", "test_label_distribution", "train_clean_labels")
_SUM_TOLERANCE = 1e-4


class NpzConfig(SourceConfig):
    """A NumPy file with the arrays ``train_images``, ``train_labels``, ``test_images`` and ``test_labels``.

    Images are square: ``[N, H, W]`` or ``[N, H, W, C]`` with 1 or 3 channels, uint8, or floating point in [0, 1].
    Labels are integers ``[N]`` from 0. ``label_names`` (or ``class_names``), an array of text, names the classes;
    without it the classes are those of the training labels, and each needs an example there.

    Three more arrays may be there. ``train_label_distribution`` and ``test_label_distribution``, floating point
    ``[N, K]`` of non-negative rows that sum to 1, say how the label of each image is truly distributed, or what people
    said; no training sees them. ``train_clean_labels``, integers ``[N]``, are the right labels of training images whose
    ``train_labels`` are not; a subset is balanced by them.
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


def read_arrays(path: Path, *, required: Sequence[str] = _REQUIRED, optional: Sequence[str] = _OPTIONAL) -> Arrays:
    """Return arrays of a file by name; without names, those that data consist of.

    Args:
        path: the ``.npz`` file.
        required: names that it must have.
        optional: names that are read where they are there.

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
            missing = [name for name in required if name not in file.files]
            if missing:
                raise InputError(f"it has no array {', '.join(missing)}; it has {', '.join(file.files) or 'none'}")
            return {name: file[name] for name in (*required, *optional) if name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if "trust" in str(error):  # NumPy's guess at any file that begins like none of its own, with unsafe advice
            raise InputError(f"cannot read {path}: it is no NumPy archive (.npz) of plain arrays") from error
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


def split_of(arrays: Arrays, split: Literal["train", "test"], *, num_classes: int, path: Path) -> ImageSplit:
    """Return the images and labels of a split, with the label distributions and clean labels that the arrays hold.

    Raises:
        InputError: shapes, types or values are not those that :class:`NpzConfig` wants.
    """
    images, labels = _images_of(arrays, split, path), _labels_of(arrays, split, path)
    if len(labels) != len(images):
        raise InputError(f"{split}_labels of {path} has {len(labels)} labels for {len(images)} images")
    if labels.max() >= num_classes:
        raise InputError(f"{split}_labels of {path} has label {int(labels.max())}; wanted 0 to {num_classes - 1}")
    facts = {"num_examples": len(images), "num_classes": num_classes}
    said, right = (arrays.get(f"{split}_{name}") for name in ("label_distribution", "clean_labels"))
    return ImageSplit(
        images=images,
        labels=labels,
        label_distribution=None
        if said is None
        else distribution_of(said, f"{split}_label_distribution of {path}", **facts),
        clean_labels=None if right is None else labels_of(right, f"{split}_clean_labels of {path}", **facts),
    )


def distribution_of(array: np.ndarray[Any, Any], place: str, *, num_examples: int, num_classes: int) -> Tensor:
    """Return checked label distributions.

    Args:
        array: of any type and shape.
        place: names the array and its file, for messages.
        num_examples: N, the images that the rows are of.
        num_classes: K.

    Returns:
        ``[N, K]`` float32.

    Raises:
        InputError: another shape or type, or rows that are no distributions.
    """
    if array.ndim != 2 or array.dtype.kind != "f" or array.shape[1] != num_classes:
        raise InputError(f"{place} is {_described(array)}; wanted floating point of shape [N, {num_classes}]")
    if len(array) != num_examples:
        raise InputError(f"{place} has {len(array)} rows; wanted {num_examples}, one for each image")
    if not np.isfinite(array).all():
        raise InputError(f"{place} has values that are not finite")
    if array.min() < 0:
        raise InputError(f"{place} has the value {array.min():g}; wanted probabilities, not below 0")
    sums = array.sum(1, dtype=np.float64)
    wrong = np.flatnonzero(abs(sums - 1) > _SUM_TOLERANCE)
    if len(wrong):
        raise InputError(f"row {wrong[0]} of {place} sums to {sums[wrong[0]]:g}; wanted 1")
    return torch.from_numpy(array.astype(np.float32))


def labels_of(array: np.ndarray[Any, Any], place: str, *, num_examples: int, num_classes: int) -> Tensor:
    """Return checked labels.

    Args:
        array: of any type and shape.
        place: names the array and its file, for messages.
        num_examples: N, the images that the labels are of.
        num_classes: K.

    Returns:
        ``[N]`` int64, from 0 to K - 1.

    Raises:
        InputError: another shape or type, or a label that is no class.
    """
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(f"{place} is {_described(array)}; wanted integers of shape [N]")
    if len(array) != num_examples:
        raise InputError(f"{place} has {len(array)} labels; wanted {num_examples}, one for each image")
    wrong = array[(array < 0) | (array >= num_classes)]
    if len(wrong):
        raise InputError(f"{place} has label {wrong[0]}; wanted 0 to {num_classes - 1}")
    return torch.from_numpy(array.astype(np.int64))


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
