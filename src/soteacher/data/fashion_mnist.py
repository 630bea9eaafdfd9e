"""Fashion-MNIST (Xiao, Rasul & Vollgraf 2017): 60,000 + 10,000 grey images of clothes, 28 x 28 pixels; MIT licence."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from soteacher.data.dataset import DataSet, ImageSplit
from soteacher.data.download import Progress, check, fetch
from soteacher.data.reason import reason
from soteacher.data.source import SourceConfig
from soteacher.errors import InputError

CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
STATISTICS = ((0.2860,), (0.3530,))
"""Mean and standard deviation of the training images."""
URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_MD5 = {
    "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
}


class FashionMnistConfig(SourceConfig):
    """Fashion-MNIST, from ``ROOT/FashionMNIST/raw/``, plain or ``.gz`` files; downloaded if they are not there."""

    source: Literal["fashion_mnist"] = "fashion_mnist"
    """Chooses this source."""

    def load(self, root: Path, *, progress: Progress | None = None) -> DataSet:
        """Read the data; see :meth:`SourceConfig.load`."""
        raw = root / "FashionMNIST" / "raw"
        obtain_files(raw, url=URL, progress=progress)
        return self.finish(
            "fashion_mnist",
            train=self.subset(_read_split(raw, "train"), field="train_examples"),
            test=self.subset(_read_split(raw, "t10k"), field="test_examples"),
            class_names=CLASS_NAMES,
            statistics=STATISTICS,
        )


def obtain_files(raw: Path, *, url: str, progress: Progress | None = None) -> None:
    """Download those of the four files that are not in a folder, neither plain nor compressed.

    Raises:
        InputError: a file cannot be downloaded, or a compressed one that is going to be read is damaged.
    """
    for name, md5 in _MD5.items():
        archive = raw / f"{name}.gz"
        if (raw / name).is_file():
            continue
        if archive.is_file():
            check(archive, md5=md5)
        else:
            fetch(f"{url.rstrip('/')}/{archive.name}", archive, md5=md5, progress=progress)


def _read_split(raw: Path, stem: str) -> ImageSplit:
    images = read_idx(_present(raw / f"{stem}-images-idx3-ubyte"), dimensions=3)
    labels_path = _present(raw / f"{stem}-labels-idx1-ubyte")
    labels = read_idx(labels_path, dimensions=1)
    if images.shape[1:] != (28, 28):
        raise InputError(f"images in {raw} have {images.shape[1]}x{images.shape[2]} pixels; wanted 28x28")
    if len(labels) != len(images):
        raise InputError(f"{labels_path} has {len(labels)} labels for {len(images)} images")
    if labels.max() >= len(CLASS_NAMES):
        raise InputError(f"{labels_path} has label {int(labels.max())}; wanted 0 to {len(CLASS_NAMES) - 1}")
    return ImageSplit(images=images[:, None], labels=labels.long())


def _present(path: Path) -> Path:
    return path if path.is_file() else path.with_name(f"{path.name}.gz")


def read_idx(path: Path, *, dimensions: int) -> Tensor:
    """Read an array of bytes in the IDX format, plain or gzip-compressed (``.gz``).

    Args:
        path: the file.
        dimensions: how many it must have.

    Returns:
        uint8, of the shape that the file states.

    Raises:
        InputError: the file cannot be read, is of another kind, or does not hold as many values as it states.

    Source: the format's description at http://yann.lecun.com/exdb/mnist/.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {reason(error)}") from error
    header = 4 + 4 * dimensions
    kind = bytes((0, 0, 8, dimensions))  # 8 stands for unsigned bytes
    if len(content) < header or content[:4] != kind:
        raise InputError(f"{path} is no IDX file of {dimensions}-dimensional bytes: it begins with {content[:4].hex()}")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8)[header:]
    expected = 1
    for length in shape:
        expected *= length
    if len(values) != expected or not expected:
        raise InputError(f"{path} holds {len(values)} values; its header states {'x'.join(map(str, shape))}")
    return values.view(shape)
