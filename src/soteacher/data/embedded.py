"""A part of Fashion-MNIST that comes with the package, so that a first run needs no download."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from soteacher.data.dataset import DataSet
from soteacher.data.download import Progress
from soteacher.data.fashion_mnist import CLASS_NAMES, STATISTICS
from soteacher.data.npz import read_arrays, split_of
from soteacher.data.source import SourceConfig

PATH = Path(__file__).parent / "embedded" / "fashion_mnist_small.npz"
"""The file; ``tools/make_embedded.py`` in the repository makes it from the real set."""


class FashionMnistSmallConfig(SourceConfig):
    """6,000 training and 2,000 test images of Fashion-MNIST, every class equally often; part of the package."""

    source: Literal["fashion_mnist_small"] = "fashion_mnist_small"
    """Chooses this source."""

    def load(self, root: Path, *, progress: Progress | None = None) -> DataSet:
        """Read the data; see :meth:`SourceConfig.load`."""
        del root, progress
        arrays = read_arrays(PATH)
        train = split_of(arrays, "train", num_classes=len(CLASS_NAMES), path=PATH)
        test = split_of(arrays, "test", num_classes=len(CLASS_NAMES), path=PATH)
        return self.finish(
            "fashion_mnist_small",
            train=self.subset(train, field="train_examples"),
            test=self.subset(test, field="test_examples"),
            class_names=CLASS_NAMES,
            statistics=STATISTICS,
        )
