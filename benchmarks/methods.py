"""What does each distillation method cost? Times its training step beside that of ``kd``.

A student of the method and one of ``kd`` train side by side in one process on random images, a step of the one and a
step of the other in turn, data and live teacher included, so that whatever else the machine does falls on both alike.
Reported are medians over the rounds. Of a method with a preparation both stages are timed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

from benchmarks import timing
from benchmarks.ours import UNACCELERATED, assembled, batches, data_of, steps, study_of, trainee_of
from soteacher.assembly import Assembled
from soteacher.jobs import Study
from soteacher.objective import Stage
from soteacher.objectives import methods

LIMIT = 3.0
"""A method with one view of each image is to cost no more than so many steps of ``kd``."""


def main() -> None:
    """Measure, print a table and write the numbers to a JSON file if one is named."""
    given = _arguments()
    study = study_of(
        data_of(),
        teachers={"standard": {"model": given.teacher}},
        students={name: {"model": given.student, "method": name} for name in {*given.methods, "kd"}},
        training={"batch_size": given.batch_size, **UNACCELERATED},
    )
    found: dict[str, dict[str, Any]] = {}
    for name in given.methods:
        found |= measure(study, name, rounds=given.rounds)
        print(f"{name}: done", flush=True)  # minutes pass between the first method and the table
    pair = f"{given.teacher} -> {given.student}"
    _print(found, title=f"{pair}, batch {given.batch_size}, training step on the CPU")
    settings = {"pair": pair, "batch_size": given.batch_size, "rounds": given.rounds}
    timing.record(given.json, settings=settings, results={"methods": found}, threads=given.threads)


def measure(study: Study, name: str, *, rounds: int) -> dict[str, dict[str, Any]]:
    """Return the figures of a method's stages, each beside steps of ``kd``."""
    made = assembled(study, "student", name)
    stages: list[Stage] = ["training"]
    if made.stage("preparation"):
        stages.append("preparation")
    made.start_training()
    return {
        name if stage == "training" else f"{name}, {stage}": _beside_kd(study, name, made, stage, rounds)
        for stage in stages
    }


def _beside_kd(study: Study, name: str, made: Assembled, stage: Stage, rounds: int) -> dict[str, Any]:
    seconds = timing.alternate(
        {
            "kd": _steps(study, "kd", assembled(study, "student", "kd"), "training"),
            "own": _steps(study, name, made, stage),
        },
        rounds=rounds,
    )
    return {
        "milliseconds": 1000 * statistics.median(seconds["own"]),
        "ratio": timing.ratio(seconds, "own", "kd"),
        "views": [str(view) for view in made.views(stage)],
        "extra_parameters": made.extra_parameters(),
    }


def _steps(study: Study, name: str, made: Assembled, stage: Stage) -> Callable[[], None]:
    return steps(trainee_of(study, "student", name, made, stage), batches(study, made.views(stage)))


def _print(found: dict[str, dict[str, Any]], *, title: str) -> None:
    timing.table(
        title,
        ("method", "ms a step", "steps of kd (quartiles)", "more views", "parameters in training"),
        [
            (
                name,
                f"{figures['milliseconds']:.0f}",
                timing.spread(figures["ratio"]) + (" *" if figures["ratio"]["median"] > LIMIT else ""),
                ", ".join(figures["views"]) or "-",
                f"{figures['extra_parameters']:,}",
            )
            for name, figures in found.items()
        ],
        caption=f"medians; * above {LIMIT:g}",
    )


def _arguments() -> argparse.Namespace:
    students = [method.name for method in methods().values() if method.role == "student"]
    parser = timing.arguments(__doc__, rounds=8, threads=1)
    parser.add_argument("--teacher", default="wrn_40_2", help="name of the teacher's network")
    parser.add_argument("--student", default="wrn_16_2", help="name of the student's network")
    parser.add_argument("--methods", nargs="+", default=students, metavar="METHOD", choices=students)
    return timing.checked(parser)


if __name__ == "__main__":
    timing.run(main)
