"""What do kept answers of a teacher save? Runs a whole study with and without them, in turn.

One teacher, which is finished before, teaches students of several methods and seeds; every student is trained as in any
study, side by side with others where there are cores for it. Students of one seed see the same views of the images in
the same order: the first one of them asks the teacher, the others read. The store begins empty in every run.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks import timing
from soteacher.config import StudyConfig
from soteacher.files import read_json
from soteacher.run_folder import STATE
from soteacher.studies import run_study
from soteacher.train.answer_store import CHECKS

LIVE, KEPT = "live", "kept answers"
METHODS = ("kd", "dkd", "ttm")
TEST_EXAMPLES = 2_000


def main() -> None:
    """Measure, print tables and write the numbers to a JSON file if one is named."""
    given = _arguments()
    data = {"source": "cifar100", "train_examples": given.examples, "test_examples": TEST_EXAMPLES}
    with TemporaryDirectory() as folder:
        file = given.teacher_file
        if file is None:
            print(f"training {given.teacher} for {given.teacher_epochs} epochs", flush=True)
            file = train_teacher(
                data, given.teacher, Path(folder) / "teacher", batch_size=given.batch_size,
                epochs=given.teacher_epochs, data_root=given.data_root,
            )  # fmt: skip
        settings = study_settings(
            data, file, model=given.student, methods=given.methods, seeds=given.seeds, epochs=given.epochs,
            batch_size=given.batch_size,
        )  # fmt: skip
        found = measure(settings, Path(folder), rounds=given.rounds, data_root=given.data_root, workers=given.workers)
    _show(f"{given.teacher} -> {given.student}, {given.epochs} epochs of {given.examples:,} images", found)
    names = ("teacher", "student", "methods", "seeds", "epochs", "examples", "batch_size", "rounds")
    options = {name: getattr(given, name) for name in names}
    timing.record(given.json, settings=options, results=found, threads=found["plan"]["threads"])


def train_teacher(
    data: Mapping[str, Any], model: str, folder: Path, *, batch_size: int, epochs: int, data_root: Path | None
) -> Path:
    """Return the folder of a run in which one standard teacher was trained."""
    config = {
        "data": data, "seeds": [0], "teachers": {"standard": {"model": model}}, "card": None, "logging": [],
        "training": {"epochs": epochs, "batch_size": batch_size},
    }  # fmt: skip
    run_study(StudyConfig.model_validate(config), folder, data_root=data_root)
    return folder


def study_settings(
    data: Mapping[str, Any],
    teacher: Path,
    *,
    model: str,
    methods: Sequence[str],
    seeds: int,
    epochs: int,
    batch_size: int,
) -> dict[str, Any]:
    """Return the settings of the study that is run.

    Args:
        data: the images.
        teacher: a file or folder of a finished network.
        model: the students' network.
        methods: each of one student.
        seeds: how many students there are of each method.
        epochs: of each student.
        batch_size: images of a batch.
    """
    return {
        "data": dict(data), "seeds": list(range(seeds)), "card": None, "logging": [],
        "teachers": {"standard": {"file": str(teacher)}},
        "students": {method: {"model": model, "method": method} for method in methods},
        "training": {"epochs": epochs, "batch_size": batch_size},
    }  # fmt: skip


def measure(
    settings: Mapping[str, Any], folder: Path, *, rounds: int, data_root: Path | None, workers: int | None = None
) -> dict[str, Any]:
    """Return the figures of a study with and without kept answers.

    Args:
        settings: of the study, without ``teacher_cache``.
        folder: takes the runs, of which the last of each way stays.
        rounds: runs of each way.
        data_root: where data sets lie.
        workers: networks side by side; ``None``: as the study chooses.

    Returns:
        ``ways``, by name ``study_seconds``, ``students_seconds`` and ``images_per_second``, medians; the ratios of both
        times; ``answers``: how many the students wanted, how many are in the store, the share that was read (less where
        two students have asked the same at the same moment), the store's bytes on disk; ``accuracies`` by student; and
        ``plan``, how many networks ran side by side.
    """
    answers = folder / "answers"
    trained: dict[str, list[float]] = {LIVE: [], KEPT: []}
    rows: dict[str, list[dict[str, Any]]] = {}

    def run(way: str) -> None:
        run_folder = folder / way.replace(" ", "_")
        for old in (run_folder, answers):
            rmtree(old, ignore_errors=True)
        cache = {"teacher_cache": {"folder": str(answers)}} if way == KEPT else {}
        config = StudyConfig.model_validate({**settings, **cache})
        results = run_study(config, run_folder, data_root=data_root, workers=workers)
        rows[way] = [row for row in results["rows"] if row["role"] == "student"]
        trained[way].append(sum(row["train_seconds"] for row in rows[way]))
        if way == KEPT:
            stored.append(_stored(answers))

    stored: list[dict[str, int]] = []
    calls: dict[str, Callable[[], None]] = {LIVE: lambda: run(LIVE), KEPT: lambda: run(KEPT)}
    seconds = timing.alternate(calls, rounds=rounds, warm_up=0)
    images = sum(round(row["images_per_second"] * row["train_seconds"]) for row in rows[LIVE])
    ways = {
        way: {
            "study_seconds": statistics.median(seconds[way]),
            "students_seconds": statistics.median(trained[way]),
            "images_per_second": images / statistics.median(trained[way]),
        }
        for way in (LIVE, KEPT)
    }
    state = read_json(folder / LIVE / STATE)
    return {
        "ways": ways,
        "study_times_as_fast": timing.ratio(seconds, LIVE, KEPT),
        "students_times_as_fast": timing.ratio(trained, LIVE, KEPT),
        "answers": {"wanted": images, **stored[-1], "share_read": 1 - stored[-1]["kept"] / images},
        "accuracies": _accuracies(rows),
        "plan": {"workers": state["workers"], "threads": state["threads"]},
    }


def _stored(folder: Path) -> dict[str, int]:
    """Return how many answers a folder holds, and its size on disk."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    kept = sum(int(np.count_nonzero(np.fromfile(path, np.uint32))) for path in files if path.name == CHECKS)
    return {"kept": kept, "bytes_on_disk": sum(512 * path.stat().st_blocks for path in files)}


def _accuracies(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return the students' accuracies side by side, by arm in the order of the seeds."""
    found: dict[str, dict[str, Any]] = {}
    for way, students in rows.items():
        for row in students:
            found.setdefault(row["arm"], {}).setdefault(way, []).append(row["accuracy_last"])
    for of_arm in found.values():
        of_arm["mean_difference"] = statistics.fmean(of_arm[KEPT]) - statistics.fmean(of_arm[LIVE])
    return found


def _show(title: str, found: Mapping[str, Any]) -> None:
    ratios = {
        LIVE: ("1", "1"),
        KEPT: (timing.spread(found["study_times_as_fast"]), timing.spread(found["students_times_as_fast"])),
    }
    plan, answers = found["plan"], found["answers"]
    timing.table(
        title,
        ("teacher", "study, s", "times as fast", "students' training, s", "times as fast", "images / s"),
        [
            (
                way, f"{row['study_seconds']:.0f}", ratios[way][0], f"{row['students_seconds']:.0f}", ratios[way][1],
                f"{row['images_per_second']:,.0f}",
            )
            for way, row in found["ways"].items()
        ],
        caption=f"medians (quartiles); {plan['workers']} side by side with {plan['threads']} threads each; "
        f"{answers['share_read']:.0%} of {answers['wanted']:,} answers were read, {answers['bytes_on_disk'] / 1e6:.0f} "
        "MB on disk",
    )  # fmt: skip
    timing.table(
        "students' accuracies on the test images, by seed",
        ("student", LIVE, KEPT, "mean difference"),
        [
            (arm, *(" ".join(f"{value:.4f}" for value in row[way]) for way in (LIVE, KEPT)),
             f"{row['mean_difference']:+.4f}")
            for arm, row in found["accuracies"].items()
        ],
    )  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = timing.arguments(__doc__, rounds=2)
    parser.add_argument("--teacher", default="wrn_40_2", help="the teacher's network")
    parser.add_argument("--teacher-file", type=Path, help="finished teacher; where it is left out, one is trained")
    parser.add_argument("--teacher-epochs", type=int, default=2, help="epochs of a teacher that is trained")
    parser.add_argument("--student", default="resnet8", help="the students' network")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="the students' methods, logits only")
    parser.add_argument("--seeds", type=int, default=3, help="students of each method")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of each student")
    parser.add_argument("--examples", type=int, default=5_000, help="training images")
    parser.add_argument("--workers", type=int, help="networks side by side; as the study chooses where it is left out")
    parser.add_argument("--data-root", type=Path, help="folder of CIFAR-100")
    return timing.checked(parser)


if __name__ == "__main__":
    timing.run(main)
