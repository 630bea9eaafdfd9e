"""What does each distillation method cost? Times its training step beside that of ``kd``.

A student of the method and one of ``kd`` train side by side in one process on random images, a step of the one and a
step of the other in turn, data and live teacher included, so that whatever else the machine does falls on both alike.
Reported are medians over the rounds. Of a method with a preparation both stages are timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from soteacher.assembly import Assembled, assemble
from soteacher.config import Student, StudyConfig
from soteacher.data import DataSet, ImageSplit, TrainLoader
from soteacher.environment import environment
from soteacher.errors import InputError
from soteacher.files import write_json
from soteacher.jobs import Job, Study
from soteacher.models.classifier import Classifier
from soteacher.models.zoo import build_network
from soteacher.networks import make_trainee
from soteacher.objective import Stage
from soteacher.objectives import methods
from soteacher.train.loop import train_step
from soteacher.types import Batch

CLASSES, EXAMPLES = 100, 50_000
"""CIFAR-100's training set, as far as memories are concerned."""
WARM_UP = 2
"""Rounds that are not counted: the first step allocates."""
LIMIT = 3.0
"""A method with one view of each image is to cost no more than so many steps of ``kd``."""


def main() -> None:
    """Measure, print a table and write the numbers to a JSON file if one is named."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    study = _study(arguments.teacher, arguments.student, arguments.batch_size, arguments.methods)
    found: dict[str, dict[str, Any]] = {}
    for name in arguments.methods:
        found |= measure(study, name, rounds=arguments.rounds)
        print(f"{name}: done", flush=True)  # minutes pass between the first method and the table
    pair = f"{arguments.teacher} -> {arguments.student}"
    Console(width=110).print(_table(found, title=f"{pair}, batch {arguments.batch_size}, training step on the CPU"))
    if arguments.json is not None:
        settings = {"pair": pair, "batch_size": arguments.batch_size, "rounds": arguments.rounds}
        write_json(
            arguments.json,
            {"settings": settings, "machine": environment("cpu", arguments.threads), "methods": found},
        )


def measure(study: Study, name: str, *, rounds: int) -> dict[str, dict[str, Any]]:
    """Return the figures of a method's stages, each beside steps of ``kd``."""
    made = _assemble(study, name)
    stages: list[Stage] = ["training"]
    if made.stage("preparation"):
        stages.append("preparation")
    made.start_training()
    return {
        name if stage == "training" else f"{name}, {stage}": _beside_kd(study, name, made, stage, rounds)
        for stage in stages
    }


def _beside_kd(study: Study, name: str, made: Assembled, stage: Stage, rounds: int) -> dict[str, Any]:
    steps = {"kd": _steps(study, "kd", _assemble(study, "kd"), "training"), "own": _steps(study, name, made, stage)}
    seconds: dict[str, list[float]] = {key: [] for key in steps}
    for round_number in range(WARM_UP + rounds):
        for key in steps if round_number % 2 == 0 else reversed(steps):
            start = time.perf_counter()
            steps[key]()
            if round_number >= WARM_UP:
                seconds[key].append(time.perf_counter() - start)
    ratios = [own / plain for own, plain in zip(seconds["own"], seconds["kd"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "milliseconds": 1000 * statistics.median(seconds["own"]),
        "ratio": {"median": middle, "quartile_low": low, "quartile_high": high},
        "views": [str(view) for view in made.views(stage)],
        "extra_parameters": made.extra_parameters(),
    }


def _steps(study: Study, name: str, made: Assembled, stage: Stage) -> Callable[[], None]:
    """Return a function that takes the next step of a stage of a method, loading of the batch included."""
    spec = study.config.students[name]
    training = study.config.training_of(spec)
    trainee = make_trainee(study, Job("student", name, 0), made, [_teacher(study)], training, stage)
    batches = _batches(study, made, stage, training.batch_size)
    numbers = count()
    trainee.forward.train()

    def take_step() -> None:
        train_step(trainee, next(batches), epoch=1, progress=0.5, seed=next(numbers))

    return take_step


def _batches(study: Study, made: Assembled, stage: Stage, batch_size: int) -> Iterator[Batch]:
    loader = TrainLoader(
        study.data.train, batch_size=batch_size, augment=study.config.data.augment, seed=0, device="cpu",
        views=made.views(stage),
    )  # fmt: skip
    return chain.from_iterable(loader.epoch(epoch) for epoch in count())


def _assemble(study: Study, name: str) -> Assembled:
    spec: Student = study.config.students[name]
    return assemble(study, spec, role="student", seed=0, teacher=_teacher(study), teacher_name="teacher")


def _teacher(study: Study) -> Classifier:
    torch.manual_seed(1)
    network = build_network(study.config.teachers["standard"].model, num_classes=CLASSES)  # pyright: ignore[reportAttributeAccessIssue,reportArgumentType]
    return Classifier(network, mean=study.data.mean, std=study.data.std).eval().requires_grad_(False)


def _study(teacher: str, student: str, batch_size: int, names: Sequence[str]) -> Study:
    """Return a study of all methods on random images, of which nothing is written or read."""
    config = StudyConfig.model_validate(
        {
            "data": {"source": "cifar100"},
            "teachers": {"standard": {"model": teacher}},
            "students": {name: {"model": student, "method": name} for name in {*names, "kd"}},
            "training": {"batch_size": batch_size},
        }
    )
    generator = torch.Generator().manual_seed(0)

    def split(size: int) -> ImageSplit:
        images = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return ImageSplit(images=images, labels=torch.arange(size) % CLASSES)

    data = DataSet(
        name="random", train=split(EXAMPLES), test=split(CLASSES), class_names=tuple(map(str, range(CLASSES))),
        mean=(0.5,) * 3, std=(0.25,) * 3, checksum="",
    )  # fmt: skip
    return Study(config, Path(), data, "cpu")


def _table(found: dict[str, dict[str, Any]], *, title: str) -> Table:
    table = Table("method", "ms a step", "steps of kd (quartiles)", "more views", "parameters in training", title=title)
    for name, figures in found.items():
        ratio = figures["ratio"]
        over = " *" if ratio["median"] > LIMIT else ""
        table.add_row(
            name,
            f"{figures['milliseconds']:.0f}",
            f"{ratio['median']:.2f} ({ratio['quartile_low']:.2f} to {ratio['quartile_high']:.2f}){over}",
            ", ".join(figures["views"]) or "-",
            f"{figures['extra_parameters']:,}",
        )
    table.caption = f"medians; * above {LIMIT:g}"
    return table


def _arguments() -> argparse.Namespace:
    students = [method.name for method in methods().values() if method.role == "student"]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="wrn_40_2", help="name of the teacher's network")
    parser.add_argument("--student", default="wrn_16_2", help="name of the student's network")
    parser.add_argument("--methods", nargs="+", default=students, metavar="METHOD", choices=students)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8, help="counted steps of each method, at least 2")
    parser.add_argument("--threads", type=int, default=1)
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
