"""What all sources of data have in common: their settings, and the last steps from splits to a data set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from soteacher.data.augment import AugmentConfig
from soteacher.data.dataset import DataSet, ImageSplit, channel_statistics, checksum_of, class_balanced_subset
from soteacher.data.download import Progress
from soteacher.errors import InputError
from soteacher.settings import Settings

SUBSET_SEED = 0
"""Seed of ``train_examples`` and ``test_examples``: a constant, so that all runs of a study see the same images."""


class SourceConfig(Settings, ABC):
    """Settings that every source has. Subclasses are final and add ``source``, the name they are chosen by."""

    train_examples: int | None = Field(default=None, gt=0)
    """Number of training images to use, a class-balanced subset that is always the same; null: all. It is balanced by
    the clean labels where the training labels are others."""
    test_examples: int | None = Field(default=None, gt=0)
    """Number of test images to use, a class-balanced subset that is always the same; null: all."""
    augment: AugmentConfig = AugmentConfig()
    """Random changes to training images."""
    mean: tuple[float, ...] | None = None
    """By channel, of images in [0, 1]: what networks subtract; null: the source's own."""
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """By channel, of images in [0, 1]: what networks divide by; null: the source's own."""

    @abstractmethod
    def load(self, root: Path, *, progress: Progress | None = None) -> DataSet:
        """Read the data.

        Args:
            root: folder of downloadable sets.
            progress: told of downloads and long readings.

        Raises:
            InputError: the data is not there, is damaged, or does not fit the settings.
        """

    def subset(self, split: ImageSplit, *, field: Literal["train_examples", "test_examples"]) -> ImageSplit:
        """Return the examples that the settings ask for, balanced by the clean labels where there are any.

        The images are then the same, whoever labelled them.

        Args:
            split: all examples.
            field: the setting that holds the number: ``"train_examples"`` or ``"test_examples"``.

        Raises:
            InputError: more examples are asked for than there are.
        """
        count = self.train_examples if field == "train_examples" else self.test_examples
        if count is None:
            return split
        if count > split.num_examples:
            raise InputError(f"{field} is {count}, but there are {split.num_examples}")
        classes = split.labels if split.clean_labels is None else split.clean_labels
        return split.subset(class_balanced_subset(classes, count, SUBSET_SEED))

    def finish(
        self,
        name: str,
        *,
        train: ImageSplit,
        test: ImageSplit,
        class_names: tuple[str, ...],
        statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
        skipped: tuple[Path, ...] = (),
    ) -> DataSet:
        """Return the data set of two splits that :meth:`subset` has already been applied to.

        Args:
            name: of the data set.
            train: training split.
            test: test split.
            class_names: by class id.
            statistics: the source's own mean and std; None: computed from the training images when needed.
            skipped: files left out.

        Raises:
            InputError: the training images are of one class only, the splits' images differ in shape, or mean and std
                do not fit them.
        """
        present = train.labels.unique().tolist()
        if len(present) < 2:
            only = class_names[present[0]]
            raise InputError(f"the training images of {name} are of one class only, {only!r}; wanted 2 or more")
        if train.image_shape != test.image_shape:
            raise InputError(
                f"images of {name} differ between the splits: training {_shape(train)}, test {_shape(test)}"
            )
        if statistics is None and (self.mean is None or self.std is None):
            statistics = channel_statistics(train)
        own_mean, own_std = statistics if statistics is not None else ((), ())
        mean = own_mean if self.mean is None else self.mean
        std = own_std if self.std is None else self.std
        for field, values in (("mean", mean), ("std", std)):
            if len(values) != train.image_shape[0]:
                raise InputError(
                    f"{field} has {len(values)} values; images of {name} have {train.image_shape[0]} channels"
                )
        if min(std) <= 0:
            raise InputError(f"a channel of the training images of {name} is constant (std {std}); give mean and std")
        checksum = checksum_of(train, test)
        return DataSet(
            name=name,
            train=train,
            test=test,
            class_names=class_names,
            mean=mean,
            std=std,
            checksum=checksum,
            skipped=skipped,
        )


def _shape(split: ImageSplit) -> str:
    channels, height, width = split.image_shape
    return f"{channels}x{height}x{width}"
