"""What all measurements share: variants in turn, ratios pair by pair, arguments, the machine's peak, the record."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from soteacher.environment import environment
from soteacher.errors import InputError
from soteacher.files import write_json

WARM_UP = 2
"""Rounds that are not counted: the first call allocates, the second may find a memory empty."""


def alternate(
    variants: Mapping[str, Callable[[], object]], *, rounds: int, warm_up: int = WARM_UP
) -> dict[str, list[float]]:
    """Return the wall-clock seconds of every counted call; see :func:`alternate_clocks`."""
    return alternate_clocks(variants, {"wall": time.perf_counter}, rounds=rounds, warm_up=warm_up)["wall"]


def alternate_clocks(
    variants: Mapping[str, Callable[[], object]],
    clocks: Mapping[str, Callable[[], float]],
    *,
    rounds: int,
    warm_up: int = WARM_UP,
) -> dict[str, dict[str, list[float]]]:
    """Call every variant once in each round, taking turns in going first, so that other load falls on all alike.

    Args:
        variants: by name; a call must have finished its work when it returns, a GPU's included.
        clocks: by name, in seconds.
        rounds: counted calls of each variant.
        warm_up: rounds before these.

    Returns:
        By clock and variant, the seconds of each counted call in the order of the rounds.
    """
    seconds: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in variants} for clock in clocks}
    names = list(variants)
    for round_number in range(warm_up + rounds):
        first = round_number % len(names)
        for name in names[first:] + names[:first]:
            start = {clock: read() for clock, read in clocks.items()}
            variants[name]()
            stop = {clock: read() for clock, read in clocks.items()}
            if round_number >= warm_up:
                for clock, times in seconds.items():
                    times[name].append(stop[clock] - start[clock])
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], base: str, other: str) -> dict[str, float]:
    """Return how many times as long ``base`` takes as ``other``, pair by pair: above 1 means that ``other`` is faster.

    Args:
        seconds: of each variant, at least two, as :func:`alternate` returns them.
        base: the variant above the line.
        other: the variant below it.

    Returns:
        ``median``, ``quartile_low`` and ``quartile_high`` of the pairs' ratios.
    """
    ratios = [above / below for above, below in zip(seconds[base], seconds[other], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median": middle, "quartile_low": low, "quartile_high": high}


def spread(figures: Mapping[str, float], digits: int = 2) -> str:
    """Return a ratio as tables show it: the median and, in brackets, the quartiles."""
    low, high = figures["quartile_low"], figures["quartile_high"]
    return f"{figures['median']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def arguments(
    description: str | None, *, rounds: int, batch_size: int = 64, threads: int = 2
) -> argparse.ArgumentParser:
    """Return a parser of the arguments that all measurements take, with these defaults; see :func:`checked`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help="counted calls of each variant, at least 2")
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--threads", type=int, default=threads)
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    return parser


def checked(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the arguments of the command line within their bounds, and give PyTorch as many threads as they say."""
    given = parser.parse_args()
    if given.rounds < 2 or given.batch_size < 2 or given.threads < 1:
        parser.error("needs --rounds and --batch-size of at least 2 and --threads of at least 1")
    torch.set_num_threads(given.threads)
    return given


@torch.no_grad()
def matrix_peak() -> dict[str, Any]:
    """Return what this machine reaches in float32 at its best, with as many threads as PyTorch has now.

    The largest of several products of square matrices and one large convolution; the library for the one may be slow
    on a processor that the other knows well.

    Returns:
        ``operations_per_second`` (a multiplication and an addition are two), ``reached_by``, and ``all`` by name.
    """
    found: dict[str, float] = {}
    for size in (512, 1024, 2048):
        matrix = torch.rand(size, size)
        found[f"product of {size} x {size} matrices"] = 2 * size**3 / _least_seconds(lambda m=matrix: m @ m)
    images, channels, side = 32, 128, 32
    maps = torch.rand(images, channels, side, side).contiguous(memory_format=torch.channels_last)
    weight = torch.rand(channels, channels, 3, 3).contiguous(memory_format=torch.channels_last)
    operations = 2 * images * side**2 * channels**2 * 9
    seconds = _least_seconds(lambda: F.conv2d(maps, weight, padding=1))
    found[f"3 x 3 convolution of {images} x {channels} maps of {side} x {side}"] = operations / seconds
    best = max(found, key=lambda name: found[name])
    return {"operations_per_second": found[best], "reached_by": best, "all": found}


def _least_seconds(call: Callable[[], object]) -> float:
    return min(alternate({"": call}, rounds=8)[""])


def record(
    path: Path | None, *, settings: Mapping[str, Any], results: Mapping[str, Any], threads: int, device: str = "cpu"
) -> None:
    """Write a measurement to a JSON file, with the machine, the versions and the commit; nothing without a path.

    Args:
        path: the file, or ``None``.
        settings: what was measured, kept as ``settings``.
        results: the figures, each under its own name.
        threads: of arithmetic.
        device: ``cpu`` or ``cuda``.
    """
    if path is not None:
        write_json(path, {"settings": dict(settings), "machine": environment(device, threads), **results})


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str | None = None, width: int = 110
) -> None:
    """Print a table, at once even where the output goes to a file: the next one may be minutes away."""
    shown = Table(*columns, title=title, caption=caption)
    for row in rows:
        shown.add_row(*row)
    console = Console(width=width)
    console.print(shown)
    console.file.flush()


def run(main: Callable[[], None]) -> None:
    """Call a measurement; an error in its input ends it with one line."""
    try:
        main()
    except InputError as error:
        raise SystemExit(str(error)) from None
