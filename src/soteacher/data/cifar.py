"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): 50,000 + 10,000 colour images of 32 x 32 pixels.

Read from the official Python archives. Those hold pickles, which could run any program when they are read; the reader
here knows nothing but arrays.
"""

from __future__ import annotations

import codecs
import pickle
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import model_validator

from soteacher.data.dataset import DataSet, ImageSplit
from soteacher.data.download import Progress, obtain_folder
from soteacher.data.human_labels import (
    LabelSource,
    TrainLabels,
    annotators_of,
    annotators_source,
    with_cifar10h,
    with_cifar10n,
)
from soteacher.data.reason import reason
from soteacher.data.source import SourceConfig
from soteacher.errors import InputError

_URL = "https://www.cs.toronto.edu/~kriz/"
_PIXELS = 3 * 32 * 32

# What arrays name as their maker, taken from an array: numpy has moved the function from module to module.
_RECONSTRUCT = np.zeros(0).__reduce__()[0]


def _from_buffer(
    buffer: bytes | bytearray, dtype: np.dtype[Any], shape: tuple[int, ...], order: Literal["C", "F"]
) -> np.ndarray[Any, Any]:
    """Make an array of its bytes, as arrays in pickles of protocol 5 ask for."""
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)


_KNOWN_GLOBALS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _RECONSTRUCT for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


class Cifar10Config(SourceConfig):
    """CIFAR-10, from ``ROOT/cifar-10-batches-py/``; downloaded if it is not there."""

    source: Literal["cifar10"] = "cifar10"
    """Chooses this source."""
    label_sources: tuple[LabelSource, ...] = ()
    """Which distributions of people's labels come with the images: ``cifar10h``, about 51 people's judgements of every
    test image; ``cifar10n``, three annotators' labels of every training image; or, instead of it, ``cifar10n_others``,
    the labels of those of the three that networks are not trained on. Their files are looked for in ``ROOT`` and
    downloaded if they are not there; their licences are CC BY-NC-SA 4.0 and CC BY-NC 4.0."""
    train_labels: TrainLabels = "clean"
    """Whose labels networks are trained on: the set's own (``clean``), or those of CIFAR-10N: one annotator's
    (``random_label1`` to ``random_label3``), the majority's (``aggre_label``), or a wrong one wherever one of the three
    is wrong (``worse_label``). The set's own are then the clean labels, by which a subset is balanced."""

    @model_validator(mode="after")
    def _check_sources(self) -> Cifar10Config:
        source = annotators_source(self.label_sources)
        if source is not None:
            annotators_of(source, self.train_labels)
        return self

    def load(self, root: Path, *, progress: Progress | None = None) -> DataSet:
        """Read the data; see :meth:`SourceConfig.load`."""
        folder = root / "cifar-10-batches-py"
        obtain_folder(
            folder,
            archive="cifar-10-python.tar.gz",
            md5="c58f30108f718f92721af3b95e74349a",
            url=_URL,
            progress=progress,
        )
        names = _class_names(folder / "batches.meta", "label_names")
        train_files = [folder / f"data_batch_{number}" for number in range(1, 6)]
        train = _read_split(train_files, "labels", num_classes=len(names))
        test = _read_split([folder / "test_batch"], "labels", num_classes=len(names))
        if "cifar10h" in self.label_sources:
            test = with_cifar10h(test, root, num_classes=len(names), progress=progress)
        source = annotators_source(self.label_sources)
        if source is not None or self.train_labels != "clean":
            train = with_cifar10n(
                train,
                root,
                labels=self.train_labels,
                source=source,
                num_classes=len(names),
                progress=progress,
            )
        return self.finish(
            "cifar10" if self.train_labels == "clean" else f"cifar10 ({self.train_labels})",
            train=self.subset(train, field="train_examples"),
            test=self.subset(test, field="test_examples"),
            class_names=names,
            statistics=((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        )


class Cifar100Config(SourceConfig):
    """CIFAR-100 with its 100 fine classes, from ``ROOT/cifar-100-python/``; downloaded if it is not there."""

    source: Literal["cifar100"] = "cifar100"
    """Chooses this source."""

    def load(self, root: Path, *, progress: Progress | None = None) -> DataSet:
        """Read the data; see :meth:`SourceConfig.load`."""
        folder = root / "cifar-100-python"
        obtain_folder(
            folder,
            archive="cifar-100-python.tar.gz",
            md5="eb9058c3a382ffc7106e4002c42a8d85",
            url=_URL,
            progress=progress,
        )
        names = _class_names(folder / "meta", "fine_label_names")
        train = _read_split([folder / "train"], "fine_labels", num_classes=len(names))
        test = _read_split([folder / "test"], "fine_labels", num_classes=len(names))
        return self.finish(
            "cifar100",
            train=self.subset(train, field="train_examples"),
            test=self.subset(test, field="test_examples"),
            class_names=names,
            statistics=((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
        )


class _ArrayUnpickler(pickle.Unpickler):
    """Reads plain values and numpy arrays, and refuses all else."""

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) not in _KNOWN_GLOBALS:
            raise InputError(f"it names {module}.{name}; wanted numpy arrays and plain values only")
        return _KNOWN_GLOBALS[module, name]


def read_record(path: Path) -> dict[str, Any]:
    """Return the dictionary that a CIFAR file holds.

    Raises:
        InputError: the file is missing or damaged, or names anything but arrays and plain values.
    """
    try:
        # Python 2 wrote the official files; latin1 maps their bytes one to one.
        record = _ArrayUnpickler(BytesIO(path.read_bytes()), encoding="latin1").load()
    except FileNotFoundError as error:
        raise InputError(
            f"file {path} is missing; remove its folder to have it unpacked or downloaded again"
        ) from error
    except Exception as error:  # damaged pickles can raise nearly anything
        raise InputError(f"cannot read CIFAR file {path}: {reason(error)}") from error
    if not isinstance(record, dict):
        raise InputError(f"cannot read CIFAR file {path}: it holds a {type(record).__name__}, wanted a dictionary")
    return {key.decode() if isinstance(key, bytes) else str(key): value for key, value in record.items()}


def _entry(record: dict[str, Any], key: str, path: Path) -> Any:
    if key not in record:
        raise InputError(f"CIFAR file {path} has no entry {key!r}; it has {', '.join(sorted(record))}")
    return record[key]


def _class_names(path: Path, key: str) -> tuple[str, ...]:
    names = _entry(read_record(path), key, path)
    if not isinstance(names, list) or len(names) < 2:
        raise InputError(f"entry {key!r} of CIFAR file {path} is no list of class names")
    return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)


def _read_split(paths: list[Path], label_key: str, *, num_classes: int) -> ImageSplit:
    images: list[np.ndarray[Any, Any]] = []
    labels: list[int] = []
    for path in paths:
        record = read_record(path)
        data, ids = _entry(record, "data", path), _entry(record, label_key, path)
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != _PIXELS:
            raise InputError(f"entry 'data' of CIFAR file {path} is no uint8 array of shape [N, {_PIXELS}]")
        if not isinstance(ids, list) or len(ids) != len(data):
            raise InputError(f"entry {label_key!r} of CIFAR file {path} is no list of {len(data)} labels")
        wrong = [label for label in ids if not isinstance(label, int) or not 0 <= label < num_classes]
        if wrong:
            raise InputError(f"CIFAR file {path} has label {wrong[0]!r}; wanted integers from 0 to {num_classes - 1}")
        images.append(data)
        labels += ids
    pixels = torch.from_numpy(np.concatenate(images)).view(-1, 3, 32, 32)
    return ImageSplit(images=pixels, labels=torch.tensor(labels, dtype=torch.int64))
