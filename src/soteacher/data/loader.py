"""Batches of a split, on the training device.

Nothing carries over from one batch to the next: order and views of an epoch follow from the seed and the epoch alone.
"""

from __future__ import annotations

import atexit
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from soteacher.data.augment import AugmentConfig, Views, apply_views, to_unit_range
from soteacher.data.dataset import ImageSplit
from soteacher.data.folder_images import FolderImages
from soteacher.data.strong import Changes, apply_changes, draw_changes
from soteacher.data.view_numbers import draw_numbered_views, number_of_views
from soteacher.errors import InputError
from soteacher.mixing import MixingConfig, mix
from soteacher.randomness import generator
from soteacher.types import Batch, View


class TrainLoader:
    """Shuffled, augmented batches of a training split; any epoch, from any batch on.

    Images in memory are moved to the device once, as they are. Images in files are decoded anew in each epoch, by
    worker processes; everything random happens on the device afterwards, so the number of workers changes nothing.

    Args:
        split: the training split.
        batch_size: examples of a batch; the last one of an epoch is smaller where they do not come out even.
        augment: random changes to the images.
        seed: of order and views.
        device: where batches are wanted.
        workers: processes that decode images in files; 0: this one.
        views: further views of each image that batches are to carry.
        rows: ``[M]`` int64 examples of the split that are trained on; all where it is left out. Batches carry their
            rows in the whole split.
        mixing: how the images of a batch are blended with one another; the further views stay whole.
        bank_seed: of the views in the augmentation's bank, if it has one; ``seed`` where it is left out.

    Raises:
        InputError: ``batch_size`` is not positive or ``workers`` is negative.
    """

    def __init__(
        self,
        split: ImageSplit,
        *,
        batch_size: int,
        augment: AugmentConfig,
        seed: int,
        device: torch.device | str,
        workers: int = 0,
        views: Sequence[View] = (),
        rows: Tensor | None = None,
        mixing: MixingConfig | None = None,
        bank_seed: int | None = None,
    ) -> None:
        self._images = _Images(split.images, batch_size=batch_size, device=torch.device(device), workers=workers)
        self._labels = split.labels.to(device)
        self._image_size = split.image_shape[1]
        self._batch_size = batch_size
        self._augment = augment
        self._seed = seed
        self._device = torch.device(device)
        self._views = views
        self._rows = torch.arange(split.num_examples) if rows is None else rows
        self._mixing = mixing
        self._bank_seed = seed if bank_seed is None else bank_seed

    @property
    def num_examples(self) -> int:
        """Number of images of an epoch."""
        return len(self._rows)

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches of an epoch, the smaller last one included."""
        return -(-self.num_examples // self._batch_size)

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """Yield an epoch's batches.

        Args:
            epoch: from 0.
            start: the batch to begin with, from 0; what follows is what it would be without a beginning in between.
        """
        order = self._rows[torch.randperm(self.num_examples, generator=generator(self._seed, "order", epoch))]
        views, numbers = self._drawn("augment", epoch)
        others: dict[View, tuple[Views, Tensor | None]] = {
            name: self._drawn(name, epoch) for name in self._views if name != "rotated"
        }
        strong = self._drawn_changes(epoch) if "strong" in self._views else None
        numbered: dict[View | None, Tensor | None] = {None: numbers}
        if "second" in others:
            numbered["second"] = others["second"][1]
        batches = order.split(self._batch_size)[start:]
        for number, (rows, loaded) in enumerate(self._images.batches(batches), start=start):
            images = apply_views(loaded, views.select(rows), self._augment)
            further: dict[View, Tensor] = {}
            for name, (other, _) in others.items():
                further[name] = apply_views(loaded, other.select(rows), self._augment)
            if strong is not None:
                further["strong"] = apply_changes(further["strong"], strong.select(rows))
            if "rotated" in self._views:
                further["rotated"] = torch.cat([images.rot90(turns, (2, 3)) for turns in (1, 2, 3)])
            batch = Batch(
                images=images, labels=self._labels[rows], indices=rows, views=further,
                keys=self._keys(batches[number - start], numbered),
            )  # fmt: skip
            yield batch if self._mixing is None else self._mixed(batch, self._mixing, epoch, number)

    def _keys(self, rows: Tensor, numbered: Mapping[View | None, Tensor | None]) -> dict[View | None, Tensor]:
        """Return a number for each view of each image of a batch, different for all views of all images."""
        count = number_of_views(self._augment) or 0
        return {view: rows * count + numbers[rows] for view, numbers in numbered.items() if numbers is not None}

    def _mixed(self, batch: Batch, mixing: MixingConfig, epoch: int, number: int) -> Batch:
        """Return a batch whose images are blended."""
        source = generator(self._seed, "mixing", epoch, number)
        images, mixture = mix(batch.images, batch.labels, mixing, source)
        keys = {view: found for view, found in batch.keys.items() if view is not None}
        return replace(batch, images=images, mixture=mixture, keys=keys)

    def _drawn(self, purpose: str, epoch: int) -> tuple[Views, Tensor | None]:
        """Return an epoch's draws of the study's augmentation for one purpose, and their numbers, for each example."""
        source = generator(self._seed, purpose, epoch)
        views, numbers = draw_numbered_views(
            self._augment, len(self._labels), source, self._image_size, bank_seed=self._bank_seed
        )
        return views.to(self._device), numbers

    def _drawn_changes(self, epoch: int) -> Changes:
        """Return an epoch's draws of the strong augmentation."""
        return draw_changes(len(self._labels), generator(self._seed, "strong changes", epoch)).to(self._device)


class EvaluationLoader:
    """All examples of a split in order, as they are.

    Args:
        split: the split.
        batch_size: examples of a batch; the last one may be smaller.
        device: where batches are wanted.
        workers: processes that decode images in files; 0: this one.

    Raises:
        InputError: ``batch_size`` is not positive or ``workers`` is negative.
    """

    def __init__(self, split: ImageSplit, *, batch_size: int, device: torch.device | str, workers: int = 0) -> None:
        self._images = _Images(split.images, batch_size=batch_size, device=torch.device(device), workers=workers)
        self._labels = split.labels.to(device)
        self._batch_size = batch_size

    @property
    def num_examples(self) -> int:
        """Number of images."""
        return len(self._labels)

    def __iter__(self) -> Iterator[Batch]:
        rows_in_order = torch.arange(self.num_examples).split(self._batch_size)
        for rows, images in self._images.batches(rows_in_order):
            yield Batch(images=to_unit_range(images), labels=self._labels[rows], indices=rows)


class _Images:
    """Images of given rows on a device, wherever they come from."""

    def __init__(self, images: Tensor | FolderImages, *, batch_size: int, device: torch.device, workers: int) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; wanted at least 1")
        if workers < 0:
            raise InputError(f"workers is {workers}; wanted at least 0")
        self._images = images if isinstance(images, FolderImages) else images.to(device)
        self._device = device
        self._workers = workers

    def batches(self, rows_of_batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield rows and images of every batch, both on the device."""
        if isinstance(self._images, FolderImages):
            yield from self._decoded(self._images, list(rows_of_batches))
            return
        for rows in rows_of_batches:
            rows_on_device = rows.to(self._device)
            yield rows_on_device, self._images.index_select(0, rows_on_device)

    def _decoded(self, images: FolderImages, rows_of_batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            _Files(images),
            batch_sampler=[rows.tolist() for rows in rows_of_batches],
            num_workers=self._workers,
            collate_fn=_stack,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # its own, or each epoch would draw from the process's random state
            worker_init_fn=_leave_signals_to_parent,
        )
        held = [iter(loader)]  # the only hold on the processes: letting go of it ends them
        # At its end the interpreter sends SIGTERM to processes still there and waits for them: end them before.
        atexit.register(held.clear)
        try:
            for rows in rows_of_batches:
                decoded, problem = next(held[0])
                if problem:
                    raise InputError(problem)
                yield rows.to(self._device), decoded.to(self._device, non_blocking=True)
        finally:
            held.clear()
            atexit.unregister(held.clear)


def _leave_signals_to_parent(worker: int) -> None:
    """Let a decoding process outlast signals that reach all processes at once: its parent needs it to the last step.

    It ends when its parent ends the iteration or is gone.
    """
    del worker
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _Files(Dataset["Tensor | str"]):
    """Decoded images, or why they could not be: an error raised in a worker would lose its one line on the way."""

    def __init__(self, images: FolderImages) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            return self._images.read(index)
        except InputError as error:
            return str(error)


def _stack(items: list[Tensor | str]) -> tuple[Tensor, str]:
    """Return a batch's images, and the first problem among them or an empty string."""
    problems = [item for item in items if isinstance(item, str)]
    if problems:
        return torch.empty(0), problems[0]
    return torch.stack([item for item in items if isinstance(item, Tensor)]), ""
