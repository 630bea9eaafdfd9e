"""Make the part of Fashion-MNIST that comes with the package, from the real set.

    python tools/make_embedded.py [ROOT]

ROOT holds ``FashionMNIST/raw/``; without it the set is looked for, or downloaded to, where soteacher keeps its data.
The images are drawn with a fixed seed, every class equally often, and keep the order of the original. The same input
gives the same file, byte for byte, with one version of zlib.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from soteacher.data import FashionMnistConfig, ImageSplit, load_data
from soteacher.data.embedded import PATH
from soteacher.files import replacing

TRAIN_EXAMPLES = 6_000
TEST_EXAMPLES = 2_000


def main(root: Path | None) -> None:
    """Write the file into the package's sources."""
    config = FashionMnistConfig(train_examples=TRAIN_EXAMPLES, test_examples=TEST_EXAMPLES)
    data = load_data(config, root)
    train_images, train_labels = arrays_of(data.train)
    test_images, test_labels = arrays_of(data.test)
    with replacing(PATH) as part, part.open("wb") as file:
        np.savez_compressed(
            file,
            train_images=train_images,
            train_labels=train_labels,
            test_images=test_images,
            test_labels=test_labels,
        )


def arrays_of(split: ImageSplit) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return a split's images ``[N, H, W]`` and labels ``[N]``, both uint8."""
    assert isinstance(split.images, Tensor)
    return split.images[:, 0].numpy(), split.labels.to(torch.uint8).numpy()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
