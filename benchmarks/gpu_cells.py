"""One training in all its ways: set up, timed in turns, counted; and several of it at once."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu_counts import count_step
from benchmarks.gpu_packed import WARM_UP, Packed, costs, order
from benchmarks.gpu_steps import (
    FIELD,
    Cell,
    Training,
    Variant,
    cell_study,
    choose_algorithms,
    field_steps,
    own_cell,
    synchronise,
)
from benchmarks.timing import alternate, ratio
from soteacher.data import DataSet
from soteacher.errors import InputError

TRAINING_SET, EPOCHS = 50_000, 240
"""CIFAR-100's training images, and the passes of the standard recipe over them."""
FIRST_GUESS = {"eager": 6.0, "compiled": 75.0}
"""Seconds until a training is ready, before one has been seen."""


@dataclass(slots=True)
class Clock:
    """The time that is left, and how long things have taken so far."""

    end: float
    """On ``time.monotonic``."""
    guesses: dict[str, float] = field(default_factory=lambda: dict(FIRST_GUESS))
    """Seconds until a training of a kind is ready."""
    seen: set[str] = field(default_factory=set[str])
    """Of which kind there has been one."""

    def left(self) -> float:
        """Return the seconds left."""
        return self.end - time.monotonic()

    def fits(self, effort: str, more: float = 0.0) -> bool:
        """Return whether there is time for something of a kind, and so many seconds more."""
        return self.guesses[effort] + more < self.left()

    def learn(self, effort: str, seconds: float) -> None:
        """Expect of the next one of the kind what the slowest so far has taken."""
        self.guesses[effort] = max(self.guesses[effort], seconds) if effort in self.seen else seconds
        self.seen.add(effort)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured, and how closely."""

    data: DataSet
    device: str
    workers: int
    """Of the field's loader."""
    rounds: int
    block_seconds: float
    packed: Sequence[int]
    packed_seconds: float
    threads: int


@dataclass(slots=True)
class Way:
    """A way that stands ready."""

    variant: Variant
    step: Callable[[], None]
    training: Training | None
    """``None`` for the field's."""
    steps: int = 1
    """Of a block."""


def measure_cell(
    plan: Plan, cell: Cell, variants: Sequence[Variant], clock: Clock, peak: Mapping[str, float]
) -> dict[str, Any]:
    """Return the ``rows`` of one training by way, and which are ``skipped`` and why.

    Args:
        plan: how closely to look.
        cell: what is trained.
        variants: the ways.
        clock: the time left.
        peak: what the device reaches; see :func:`benchmarks.gpu_counts.peaks`.
    """
    ways, skipped = _ready(plan, cell, variants, clock)
    if not ways:
        return {"rows": {}, "skipped": skipped}
    for way in ways:
        _choose_steps(plan, way)
    blocks = {way.variant.name: _block(plan, way) for way in ways}
    round_seconds = sum(_seconds_of(block) for block in blocks.values())
    rounds = min(plan.rounds, int((clock.left() - 1) / round_seconds) - 1)
    if rounds < 2:
        late = {way.variant.name: f"no time left for two rounds of {round_seconds:.0f} s" for way in ways}
        return {"rows": {}, "skipped": skipped | late}
    taken = alternate(blocks, rounds=rounds, warm_up=1)
    seconds = {way.variant.name: [value / way.steps for value in taken[way.variant.name]] for way in ways}
    counts = {way.variant.precision: count_step(way.step) for way in ways if _countable(way)}
    rows: dict[str, Any] = {}
    for before, way in zip([None, *ways], ways, strict=False):
        rows[way.variant.name] = _row(cell, way, before, seconds, counts, peak)
    found: dict[str, Any] = {"rows": rows, "skipped": skipped, "rounds": rounds}
    offered = [way for way in ways if way.variant.offered]
    if cell.student is None and offered:
        fastest = min(offered, key=lambda way: rows[way.variant.name]["seconds_per_step"])
        found["whole_training"] = _projected(cell, fastest, rows[fastest.variant.name]["seconds_per_step"])
    return found


def _ready(plan: Plan, cell: Cell, variants: Sequence[Variant], clock: Clock) -> tuple[list[Way], dict[str, str]]:
    """Return the ways for which there is time, warmed up, and why others are missing."""
    ways: list[Way] = []
    skipped: dict[str, str] = {}
    for variant in variants:
        effort = "eager" if variant.compiled == "no" else "compiled"
        rounds_to_come = (plan.rounds + 2) * plan.block_seconds * (len(ways) + 1)
        if not clock.fits(effort, rounds_to_come):
            skipped[variant.name] = f"about {clock.guesses[effort]:.0f} s to set up, {clock.left():.0f} s left"
            continue
        start = time.monotonic()
        try:
            way = _set_up(plan, cell, variant)
        except (RuntimeError, InputError) as error:  # of memory, or of the compiler: the other rows are worth having
            skipped[variant.name] = f"failed: {str(error).strip().splitlines()[0]}"
            continue
        clock.learn(effort, time.monotonic() - start)
        ways.append(way)
    return ways, skipped


def _set_up(plan: Plan, cell: Cell, variant: Variant) -> Way:
    training = None if variant.field else own_cell(cell, variant, plan.data, plan.device)
    step = field_steps(cell, plan.data, plan.device, workers=plan.workers) if training is None else training.step
    choose_algorithms(plan.device, free=variant.free)  # after the set-up, which chooses as the library does
    for _ in range(WARM_UP):
        step()
    synchronise(plan.device)
    return Way(variant, step, training)


def _choose_steps(plan: Plan, way: Way) -> None:
    """Make a block long enough to time, and the field's longer than what its workers have prepared before it."""
    way.steps = 5
    seconds = _seconds_of(_block(plan, way)) / way.steps
    prepared = 2 * plan.workers if way.training is None else 0
    way.steps = max(2, math.ceil(plan.block_seconds / seconds), 5 * prepared)


def _block(plan: Plan, way: Way) -> Callable[[], None]:
    def take_block() -> None:
        choose_algorithms(plan.device, free=way.variant.free)
        for _ in range(way.steps):
            way.step()
        synchronise(plan.device)

    return take_block


def _seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _countable(way: Way) -> bool:
    return way.training is not None and way.variant.compiled == "no"


def _row(
    cell: Cell,
    way: Way,
    before: Way | None,
    seconds: Mapping[str, Sequence[float]],
    counts: Mapping[str, Mapping[str, int]],
    peak: Mapping[str, float],
) -> dict[str, Any]:
    name, field_name = way.variant.name, next((other for other in seconds if other == FIELD.name), None)
    step = statistics.median(seconds[name])
    row: dict[str, Any] = {
        "seconds_per_step": step, "images_per_second": cell.batch_size / step, "steps_of_a_block": way.steps,
        "seconds": list(seconds[name]),
        "gain": None if before is None else ratio(seconds, before.variant.name, name),
        "times_the_field": None if field_name is None else ratio(seconds, field_name, name),
    }  # fmt: skip
    if (counted := counts.get(way.variant.precision)) is not None:
        row |= counted
        row["share_of_bf16_peak"] = counted["operations"] / step / peak["bf16_operations_per_second"]
        row["share_of_bandwidth"] = counted["bytes_least"] / step / peak["bytes_per_second"]
    return row


def _projected(cell: Cell, way: Way, step_seconds: float) -> dict[str, Any]:
    """Return how long a teacher's whole training would take on CIFAR-100, in all and by its parts.

    After each epoch the network is tested and its state saved.
    """
    assert way.training is not None
    found = costs(way.training)
    parts = {
        "steps_seconds": math.ceil(TRAINING_SET / cell.batch_size) * step_seconds,
        "epoch_starts_seconds": found["epoch_start_seconds"],
        "tests_seconds": found["evaluation_seconds"],
        "saving_seconds": found["saving_seconds"],
    }
    whole = {name: EPOCHS * seconds for name, seconds in parts.items()}
    return {"way": way.variant.name, "epochs": EPOCHS, **whole, "seconds": sum(whole.values())}


def measure_packed(plan: Plan, cell: Cell, variant: Variant, clock: Clock) -> dict[str, Any]:
    """Return the images a second of several processes that train the same network on the device at once."""
    effort, most = "eager" if variant.compiled == "no" else "compiled", max(plan.packed)
    wanted = plan.rounds * len(plan.packed) * plan.packed_seconds
    if not clock.fits(effort, wanted):
        return {"skipped": f"about {clock.guesses[effort] + wanted:.0f} s needed, {clock.left():.0f} s left"}
    told = order(
        cell_study(cell, variant), "teacher", "soteacher", device=plan.device, threads=plan.threads,
        random_images=(plan.data.train.num_examples, plan.data.test.num_examples),
    )  # fmt: skip
    rates: dict[int, list[float]] = {count: [] for count in plan.packed}
    try:
        with Packed([told] * most) as processes:
            processes.ready(max(clock.left() - wanted, 1.0))
            for _ in range(plan.rounds):
                for count in plan.packed:
                    answers = processes.run(range(count), plan.packed_seconds)
                    rates[count].append(sum(answer["images"] / answer["seconds"] for answer in answers))
    except InputError as error:
        return {"skipped": str(error)}
    one = statistics.median(rates[plan.packed[0]])
    medians = {str(count): statistics.median(found) for count, found in rates.items()}
    gains = {count: rate / one for count, rate in medians.items()}
    return {"way": variant.name, "images_per_second": medians, "gain": gains}
