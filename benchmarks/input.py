"""How fast do augmented training images come? Times whole epochs of our loader beside those of the field's.

Both crop and flip the same images on the CPU: the field one by one in a ``DataLoader``, without worker processes and
with two, ours a batch at a time on the training device. Before anything is timed, the images are checked to be the
same, bit for bit, where both draw the same.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.field import FieldImages, draws_of_torchvision, field_loader
from benchmarks.ours import data_of
from soteacher.data import AugmentConfig, DataSet, ImageSplit, TrainLoader
from soteacher.data.augment import apply_views
from soteacher.errors import InputError

WORKERS = 2
CHECKED = 512
"""Images that are compared with torchvision's."""


def main() -> None:
    """Measure, print a table and write the numbers to a JSON file if one is named."""
    given = _arguments()
    data = data_of(given.data_root)
    if not given.batch_size <= given.examples <= data.train.num_examples:
        raise InputError(f"--examples is {given.examples}; wanted {given.batch_size} to {data.train.num_examples}")
    split = data.train.subset(torch.arange(given.examples))
    equal = same_images(split, data)
    seconds = measure(split, data, batch_size=given.batch_size, rounds=given.rounds)
    faster = min((name for name in seconds if name.startswith("field")), key=lambda name: sum(seconds[name]))
    found = {
        name: {
            "images_per_second": given.examples / statistics.median(times),
            "times_as_fast_as_field_without_workers": timing.ratio(seconds, "field, 0 workers", name),
            "times_as_fast_as_field_at_its_best": timing.ratio(seconds, faster, name),
        }
        for name, times in seconds.items()
    }
    timing.table(
        f"input, batch {given.batch_size}, {given.threads} threads",
        ("loader", "images / s", "times the field's without workers", f"times the {faster}"),
        [(name, f"{images:,.0f}", *map(timing.spread, ratios)) for name, (images, *ratios) in _columns(found)],
        caption=f"medians (quartiles) of epochs of {given.examples:,} images; "
        f"images {'equal' if equal else 'DIFFER FROM'} torchvision's",
    )
    settings = {
        "data": data.name, "batch_size": given.batch_size, "rounds": given.rounds, "examples": given.examples
    }  # fmt: skip
    results = {"equal_to_torchvision": equal, "fastest_of_the_field": faster, "loaders": found}
    timing.record(given.json, settings=settings, results=results, threads=given.threads)


def _columns(found: dict[str, dict[str, Any]]) -> list[tuple[str, list[Any]]]:
    return [(name, list(figures.values())) for name, figures in found.items()]


def same_images(split: ImageSplit, data: DataSet) -> bool:
    """Return whether our images are the field's, before and after the normalisation, where both draw the same."""
    rows = range(min(CHECKED, split.num_examples))
    zero, one = (0.0,) * data.in_channels, (1.0,) * data.in_channels
    for mean, std in ((zero, one), (data.mean, data.std)):
        dataset = FieldImages(split, mean, std)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            theirs = torch.stack([dataset[row][0] for row in rows])
            torch.manual_seed(0)
            views = draws_of_torchvision(len(rows))
        assert isinstance(split.images, torch.Tensor)
        ours = apply_views(split.images[: len(rows)], views, AugmentConfig())
        ours = (ours - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
        if not torch.equal(ours, theirs):
            return False
    return True


def measure(split: ImageSplit, data: DataSet, *, batch_size: int, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of whole epochs, by loader."""
    variants: dict[str, Callable[[], object]] = {
        f"field, {workers} workers": _field_epoch(split, data, batch_size=batch_size, workers=workers)
        for workers in (0, WORKERS)
    }
    variants["ours"] = _our_epoch(split, batch_size=batch_size, layout=torch.contiguous_format)
    variants["ours, channels last"] = _our_epoch(split, batch_size=batch_size, layout=torch.channels_last)
    return timing.alternate(variants, rounds=rounds)


def _field_epoch(split: ImageSplit, data: DataSet, *, batch_size: int, workers: int) -> Callable[[], None]:
    loader = field_loader(split, data.mean, data.std, batch_size=batch_size, workers=workers, seed=0)

    def run_epoch() -> None:
        for _ in loader:
            pass

    return run_epoch


def _our_epoch(split: ImageSplit, *, batch_size: int, layout: torch.memory_format) -> Callable[[], None]:
    loader = TrainLoader(split, batch_size=batch_size, augment=AugmentConfig(), seed=0, device="cpu")
    numbers = count()

    def run_epoch() -> None:
        for batch in loader.epoch(next(numbers)):
            batch.images.contiguous(memory_format=layout)

    return run_epoch


def _arguments() -> argparse.Namespace:
    parser = timing.arguments(__doc__, rounds=8, threads=1)
    parser.add_argument("--examples", type=int, default=10_000, help="images of an epoch")
    parser.add_argument("--data-root", type=Path, help="folder of CIFAR-100; random images where it is left out")
    return timing.checked(parser)


if __name__ == "__main__":
    timing.run(main)
