"""What do SoTeacher's regularisers cost? Times teacher training steps with and without them.

Two copies of one network train side by side in one process, a step of the one and a step of the other in turn, so that
whatever else the machine does falls on both alike. Reported are medians over the rounds, of wall-clock time and of the
processor time of all threads; where other programs run, the second is the steadier.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from soteacher.environment import environment
from soteacher.errors import InputError
from soteacher.files import write_json
from soteacher.models.classifier import Classifier
from soteacher.models.taps import Tapped, resolve_taps
from soteacher.models.zoo import build_network
from soteacher.objectives import method, objective_config
from soteacher.train.config import TrainingConfig
from soteacher.train.loop import Trainee, fabric_for, train_step
from soteacher.train.optimizer import build_optimizer
from soteacher.types import Batch, Task

METHODS = ("standard", "soteacher")
TASK = Task(num_examples=50_000, num_classes=100)
"""CIFAR-100's training set."""
WARM_UP = 2
"""Rounds that are not counted: the first step allocates, the second finds every example new."""


def main() -> None:
    """Measure, print a table and write the numbers to a JSON file if one is named."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    seconds = measure(arguments.model, batch_size=arguments.batch_size, rounds=arguments.rounds)
    result = {
        "images_per_second": {
            name: arguments.batch_size / statistics.median(times) for name, times in seconds["wall"].items()
        },
        "time_ratio": {clock: ratio(times) for clock, times in seconds.items()},
    }
    settings = {"model": arguments.model, "batch_size": arguments.batch_size, "rounds": arguments.rounds}
    Console().print(_table(result, title=f"{arguments.model}, batch {arguments.batch_size}, training step on the CPU"))
    if arguments.json is not None:
        write_json(
            arguments.json,
            {"settings": settings, "machine": environment("cpu", arguments.threads), **result, "step_seconds": seconds},
        )


def measure(model: str, *, batch_size: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of every counted step, by clock and method; the methods take turns in going first."""
    clocks = {"wall": time.perf_counter, "processor": time.process_time}
    steps = {name: make_training_step(name, model, batch_size=batch_size) for name in METHODS}
    seconds: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in METHODS} for clock in clocks}
    for round_number in range(WARM_UP + rounds):
        for name in METHODS if round_number % 2 == 0 else reversed(METHODS):
            start = {clock: read() for clock, read in clocks.items()}
            steps[name]()
            if round_number >= WARM_UP:
                for clock, read in clocks.items():
                    seconds[clock][name].append(read() - start[clock])
    return seconds


def make_training_step(name: str, model: str, *, batch_size: int) -> Callable[[], None]:
    """Return a function that takes one step of the training loop for a teacher method, each time on one batch."""
    trainee = _trainee(name, model)
    batch = Batch(
        images=torch.rand(batch_size, 3, 32, 32),
        labels=torch.randint(0, TASK.num_classes, (batch_size,)),
        indices=torch.randperm(TASK.num_examples)[:batch_size],
    )

    def take_step() -> None:
        train_step(trainee, batch, epoch=1, progress=0.5)

    return take_step


def _trainee(name: str, model: str) -> Trainee:
    """Return a network in training on the CPU, by the standard recipe."""
    torch.manual_seed(0)
    config = TrainingConfig()
    fabric = fabric_for("cpu", config.precision)
    network = build_network(model, num_classes=TASK.num_classes, in_channels=3)
    classifier = Classifier(network, mean=(0.5,) * 3, std=(0.25,) * 3)
    terms = [objective_config(term).model_validate(chosen).term(TASK) for term, chosen in method(name).terms.items()]
    features = sorted({feature for term in terms for feature in term.objective.features})
    objectives = nn.ModuleList(term.objective for term in terms)
    optimizer: Any = build_optimizer(config.optimizer, [*classifier.parameters(), *objectives.parameters()])
    forward, optimizer = fabric.setup(Tapped(classifier, resolve_taps(classifier, features)), optimizer)
    return Trainee(
        network=network, forward=forward.train(), terms=tuple(terms), optimizer=optimizer, teacher=None,
        fabric=fabric, config=config, seed=0,
    )  # fmt: skip


def ratio(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Return the ratio of the methods' step times, pair by pair: its median and quartiles."""
    plain, regularised = (seconds[name] for name in METHODS)
    ratios = [second / first for first, second in zip(plain, regularised, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median": middle, "quartile_low": low, "quartile_high": high}


def _table(result: dict[str, Any], *, title: str) -> Table:
    table = Table("method", "images / s", "wall time of a step", "processor time of a step", title=title)
    shown = [
        f"{found['median']:.3f} x ({found['quartile_low']:.3f} to {found['quartile_high']:.3f})"
        for found in result["time_ratio"].values()
    ]
    for name, cells in zip(METHODS, (["1", "1"], shown), strict=True):
        table.add_row(name, f"{result['images_per_second'][name]:.1f}", *cells)
    table.caption = "median (quartiles) over pairs of steps"
    return table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="wrn_40_2", help="name of the teacher's network")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20, help="counted steps of each method, at least 2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    arguments = parser.parse_args()
    if arguments.rounds < 2 or arguments.batch_size < 2 or arguments.threads < 1:
        parser.error("needs --rounds and --batch-size of at least 2 and --threads of at least 1")
    return arguments


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(str(error)) from None
