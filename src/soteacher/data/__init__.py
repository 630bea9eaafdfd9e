"""Data sets by name: each source is one file; ``SOURCES`` names them all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import Field

from soteacher.data.augment import AugmentConfig
from soteacher.data.cifar import Cifar10Config, Cifar100Config
from soteacher.data.dataset import DataSet, ImageSplit, class_balanced_subset, held_out_rows
from soteacher.data.download import Progress
from soteacher.data.embedded import FashionMnistSmallConfig
from soteacher.data.fashion_mnist import FashionMnistConfig
from soteacher.data.folder import FolderConfig
from soteacher.data.folder_images import FolderImages
from soteacher.data.loader import EvaluationLoader, TrainLoader
from soteacher.data.mixed_feature import MixedFeatureConfig
from soteacher.data.npz import NpzConfig
from soteacher.data.source import SourceConfig

__all__ = [
    "SOURCES",
    "AugmentConfig",
    "Cifar10Config",
    "Cifar100Config",
    "DataConfig",
    "DataSet",
    "EvaluationLoader",
    "FashionMnistConfig",
    "FashionMnistSmallConfig",
    "FolderConfig",
    "FolderImages",
    "ImageSplit",
    "MixedFeatureConfig",
    "NpzConfig",
    "Progress",
    "SourceConfig",
    "TrainLoader",
    "class_balanced_subset",
    "data_root",
    "held_out_rows",
    "load_data",
]

SOURCES: dict[str, type[SourceConfig]] = {
    "cifar10": Cifar10Config,
    "cifar100": Cifar100Config,
    "fashion_mnist": FashionMnistConfig,
    "fashion_mnist_small": FashionMnistSmallConfig,
    "npz": NpzConfig,
    "folder": FolderConfig,
    "mixed_feature": MixedFeatureConfig,
}
"""Every source's settings, by the name that ``source`` has in them."""

DataConfig = Annotated[
    Cifar10Config
    | Cifar100Config
    | FashionMnistConfig
    | FashionMnistSmallConfig
    | NpzConfig
    | FolderConfig
    | MixedFeatureConfig,
    Field(discriminator="source"),
]
"""Settings of any source, told apart by ``source``."""


def data_root(root: Path | None = None) -> Path:
    """Return where downloadable sets are: ``root``, else ``$SOTEACHER_DATA``, else ``~/.cache/soteacher/data``."""
    chosen = root or os.environ.get("SOTEACHER_DATA") or "~/.cache/soteacher/data"
    return Path(chosen).expanduser()


def load_data(config: SourceConfig, root: Path | None = None, *, progress: Progress | None = None) -> DataSet:
    """Read the data that the settings describe; sets with an official archive are downloaded if they are not there.

    Args:
        config: of any source.
        root: see :func:`data_root`.
        progress: told of downloads and long readings.

    Raises:
        InputError: the data is not there and cannot be fetched, is damaged, or does not fit the settings.
    """
    return config.load(data_root(root), progress=progress)
