"""A teacher card in the making: the examples that it looks at, what it may still cost, what there is to note."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from soteacher.data import DataSet, EvaluationLoader, ImageSplit
from soteacher.diagnostics.card_config import CardConfig
from soteacher.diagnostics.passes import PassCounter
from soteacher.errors import InputError
from soteacher.randomness import generator

MOST_PASSES = 15
"""Evaluation passes over the examples used that a card costs at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The examples that a card looks at."""

    splits: dict[str, ImageSplit]
    """``train`` and ``test``."""
    rows: dict[str, Tensor]
    """Their rows in the whole splits, ascending."""
    out_of_fold: Tensor | None
    """Of the training examples."""

    @property
    def num_examples(self) -> int:
        """Number of images of both splits."""
        return sum(split.num_examples for split in self.splits.values())


@dataclass(slots=True, kw_only=True)
class Look:
    """A card that is being made: what it looks at, and what there is to say of the way it was made."""

    data: DataSet
    sample: Sample
    config: CardConfig
    device: torch.device
    sampled: dict[str, int] = field(default_factory=dict[str, int])
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    notes: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self.sampled |= {name: split.num_examples for name, split in self.sample.splits.items()}

    @property
    def train(self) -> ImageSplit:
        """The training examples that are looked at."""
        return self.sample.splits["train"]

    @contextmanager
    def timed(self, group: str) -> Generator[None, None, None]:
        """Note how long a group of figures takes."""
        start = time.perf_counter()
        yield
        self.seconds[group] = time.perf_counter() - start

    def images_left(self, counter: PassCounter) -> int:
        """Return how many more images may run through the network."""
        return MOST_PASSES * self.sample.num_examples - counter.images


def sample_of(data: DataSet, config: CardConfig, out_of_fold: Tensor | None) -> Sample:
    """Return the examples that a card looks at: random samples of both splits, without replacement.

    Every example is as likely as any other, so that figures of a sample estimate those of its split. Samples of one
    seed are nested: a smaller one lies within a larger one.

    Args:
        data: both splits.
        config: how many.
        out_of_fold: ``[N, K]`` for all training examples, or nothing.

    Raises:
        InputError: a split has fewer than two images, or ``out_of_fold`` does not fit the training split.
    """
    wanted = (data.train.num_examples, data.num_classes)
    if out_of_fold is not None and out_of_fold.shape != wanted:
        raise InputError(f"out-of-fold predictions have shape {list(out_of_fold.shape)}; wanted {list(wanted)}")
    rows: dict[str, Tensor] = {}
    for name, split in (("train", data.train), ("test", data.test)):
        if split.num_examples < 2:
            raise InputError(f"a card needs at least 2 images of each split, and {data.name} has 1 in {name}")
        count = min(config.examples or split.num_examples, split.num_examples)
        order = torch.randperm(split.num_examples, generator=generator(config.seed, "card", name))
        rows[name] = order[:count].sort().values
    splits = {"train": data.train.subset(rows["train"]), "test": data.test.subset(rows["test"])}
    return Sample(splits=splits, rows=rows, out_of_fold=None if out_of_fold is None else out_of_fold[rows["train"]])


def first_image(look: Look) -> Tensor:
    """Return a training image in [0, 1], ``[1, C, H, W]``, on the device."""
    one = look.train.subset(torch.tensor([0]))
    return next(iter(EvaluationLoader(one, batch_size=1, device=look.device))).images


def affordable(look: Look, counter: PassCounter, what: str, wanted: int, cost: int) -> Tensor:
    """Return rows of a random part of the training examples used: as many as are wanted, there, and affordable."""
    there = min(wanted, look.train.num_examples)
    count = max(0, min(there, look.images_left(counter) // cost))
    look.sampled[what] = count
    if count < there:
        look.notes.append(
            f"{what}: {count} images instead of {there}, so that the card costs at most {MOST_PASSES} passes"
        )
    order = torch.randperm(look.train.num_examples, generator=generator(look.config.seed, "card", what))
    return order[:count].sort().values


def batches_of(look: Look, rows: Tensor) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Yield images in [0, 1] and labels of the training examples used, on the device."""
    if len(rows):
        for batch in EvaluationLoader(look.train.subset(rows), batch_size=64, device=look.device):
            yield batch.images, batch.labels
