"""The weights of epochs before the last: which of them are kept for other networks of a study, and where they lie."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from soteacher.config import SavedTeacher, Student, StudyConfig, TrainedTeacher
from soteacher.errors import InputError
from soteacher.jobs import Job, Study, jobs_of, spec_of, teacher_of
from soteacher.models.weights import WEIGHTS_FILE
from soteacher.train.checkpoint import Checkpoint
from soteacher.train.config import Criterion, TrainingConfig, epochs_at


def epochs_to_keep(config: StudyConfig, job: Job) -> set[int]:
    """Return the numbers of finished epochs whose weights are kept beside the finished network."""
    training = _training_of(config, job)
    every, epochs = training.save_every, training.epochs_run()
    wanted = set(range(every, epochs + 1, every)) if every else set[int]()
    wanted |= {epochs_at(point, epochs) for point in _points_wanted(config, job)}
    return wanted if training.finishes else wanted - {epochs}


def _points_wanted(config: StudyConfig, job: Job) -> Iterator[float]:
    """Yield the points of a teacher's run whose weights are another teacher, or teach."""
    if job.role == "student":
        return
    for teacher in config.teachers.values():
        if isinstance(teacher, SavedTeacher) and teacher.teacher == job.arm and teacher.after is not None:
            yield teacher.after
        if isinstance(teacher, TrainedTeacher) and teacher.teacher == job.arm:
            yield from config.training_of(teacher).route
    for student in config.students.values():
        if job.arm in config.teachers_of(student):
            yield from config.training_of(student).route


def criteria_to_keep(config: StudyConfig, job: Job) -> set[Criterion]:
    """Return the figures by which a network's best epoch is kept."""
    own = _training_of(config, job).keep_best
    wanted: list[Criterion | None] = [
        spec.best
        for spec in config.teachers.values()
        if isinstance(spec, SavedTeacher) and job.role == "teacher" and spec.teacher == job.arm
    ]
    return {criterion for criterion in (own, *wanted) if criterion is not None}


def best_epochs(history: Sequence[Mapping[str, Any]], criterion: Criterion) -> int:
    """Return after how many finished epochs a figure on the held-out images was best; the earliest of equals."""
    sign = -1 if criterion == "accuracy" else 1
    values = [sign * line[f"held_out_{criterion}"] for line in history]
    return values.index(min(values)) + 1


def epoch_weights(folder: Path, finished: int) -> Path:
    """Return where a network's weights after so many finished epochs are kept."""
    return folder / "epochs" / f"after-{finished}.safetensors"


def best_weights(folder: Path, criterion: Criterion) -> Path:
    """Return where a network's weights of its best epoch are kept."""
    return folder / "epochs" / f"best-{criterion}.safetensors"


def weights_after(study: Study, source: Job, point: float) -> tuple[int, Path]:
    """Return how many epochs are finished at a point of a network's run, and where its weights of then lie."""
    training, folder = _training_of(study.config, source), study.folder_of(source)
    epochs = epochs_at(point, training.epochs_run())
    is_finished = epochs == training.epochs_run() and not training.finishes
    return epochs, folder / WEIGHTS_FILE if is_finished else epoch_weights(folder, epochs)


def saved_state(study: Study, source: Job, spec: SavedTeacher) -> tuple[int, Path]:
    """Return after how many epochs a saved teacher is the state of its source, and where its weights of then lie.

    Where the best of all epochs is wanted, the source must be finished.
    """
    if spec.after is not None:
        return weights_after(study, source, spec.after)
    assert spec.best is not None
    folder = study.folder_of(source)
    return best_epochs(history_of(folder), spec.best), best_weights(folder, spec.best)


def history_of(folder: Path) -> list[dict[str, Any]]:
    """Return the figures of each epoch of a network."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def check_saved(study: Study) -> None:
    """Make sure that the earlier states that teachers are made of, or that teach, were or will be kept.

    Raises:
        InputError: a teacher has gone on beyond a state that is wanted, and its weights of then were not kept.
    """
    for job in jobs_of(study.config):
        for source, epochs, path in () if study.finished(job) else _earlier_states(study, job):
            if not path.exists() and _epochs_done(study, source) >= epochs:
                others = study.folder_of(source).glob("epochs/after-*.safetensors")
                kept = sorted(int(other.stem.removeprefix("after-")) for other in others)
                raise InputError(
                    f"{job.name}: the weights of {source.name} {path.stem.replace('-', ' ')}"
                    f"{' epochs' if path.stem.startswith('after') else ''} were not kept; kept: {kept or 'none'}; "
                    f"train it anew in another folder, together with what needs them, or take one that was kept"
                )


def _epochs_done(study: Study, job: Job) -> int:
    """Return how many epochs of a network lie behind it, finished or not."""
    folder = study.folder_of(job)
    if study.finished(job):
        return len(history_of(folder))
    return len(Checkpoint(folder / "resume", fingerprint="").history())


def _earlier_states(study: Study, job: Job) -> Iterator[tuple[Job, int, Path]]:
    """Yield the earlier states of other networks that a network needs: whose, after how many epochs, and where."""
    spec = spec_of(study.config, job)
    if isinstance(spec, SavedTeacher):
        source = Job("teacher", spec.teacher, job.seed)
        if spec.best is not None:
            yield source, 1, best_weights(study.folder_of(source), spec.best)  # kept from the first epoch on
        elif spec.after is not None:
            yield source, *weights_after(study, source, spec.after)
    elif isinstance(spec, (TrainedTeacher, Student)) and (teacher := teacher_of(study.config, job)) is not None:
        for point in study.config.training_of(spec).route:
            yield teacher, *weights_after(study, teacher, point)


def _training_of(config: StudyConfig, job: Job) -> TrainingConfig:
    """Return how a network that is trained in the study is trained."""
    spec = spec_of(config, job)
    assert isinstance(spec, (TrainedTeacher, Student))
    return config.training_of(spec)
