"""Which students learn from kept answers of their teacher, and where these lie."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from soteacher.config import StudyConfig, TeacherCacheConfig
from soteacher.data.view_numbers import number_of_views
from soteacher.errors import InputError
from soteacher.jobs import Job, Study, teacher_of
from soteacher.models.classifier import Classifier
from soteacher.models.weights import weights_checksum
from soteacher.randomness import derive_seed
from soteacher.train.answer_store import AnswerShape, AnswerStore
from soteacher.train.config import TrainingConfig

FOLDER = "teacher_cache"


def why_live(config: StudyConfig, training: TrainingConfig, features: Collection[str]) -> str | None:
    """Return why a network's teacher must be asked in every step; ``None`` where kept answers do.

    Args:
        config: the study.
        training: of the network.
        features: of the teacher that its method wants.
    """
    if config.teacher_cache is None:
        return "the study keeps no answers"
    if features:
        return f"its method wants the teacher's {', '.join(sorted(features))}"
    if training.mixing is not None:
        return f"{training.mixing.name} makes images of which there is no end"
    if training.route:
        return "several teachers follow one another"
    return None


def bank_seed(job: Job) -> int:
    """Return the seed of the views in the augmentation's bank: one for all networks of a seed, in all their stages."""
    return derive_seed(job.seed, "view bank")


def check_answers(study: Study) -> None:
    """Make sure that a study's teachers can have their answers kept, if it wants that.

    Raises:
        InputError: there is no end of views, or the answers would take too much room.
    """
    if study.config.teacher_cache is not None:
        _shape(study, study.config.teacher_cache)


def answers_of(study: Study, job: Job, teacher: Classifier, training: TrainingConfig) -> AnswerStore:
    """Return the kept answers of a network's teacher.

    Raises:
        InputError: the answers there are another teacher's or to other images, or :func:`check_answers` refuses them.
    """
    config, taught_by = study.config.teacher_cache, teacher_of(study.config, job)
    assert config is not None
    assert taught_by is not None
    folder = _folder(study, config, job, taught_by, training.precision)
    return AnswerStore.open(folder, _shape(study, config), _provenance(study, job, teacher, training))


def remove_answers(study: Study) -> None:
    """Delete the answers that only this run could use."""
    shutil.rmtree(study.folder / FOLDER, ignore_errors=True)


def _shape(study: Study, config: TeacherCacheConfig) -> AnswerShape:
    """Return how many answers there are, and of what size."""
    views, classes = number_of_views(study.config.data.augment), study.data.num_classes
    if views is None:
        raise InputError("teacher_cache wants finitely many views of an image: set data.augment.view_bank, to 20 say")
    if config.top_k is not None and config.top_k >= classes:
        raise InputError(f"teacher_cache.top_k must be below the {classes} classes, got {config.top_k}")
    shape = AnswerShape(
        num_examples=study.data.train.num_examples, num_views=views, num_classes=classes, top_k=config.top_k
    )
    if shape.total_bytes > config.max_gigabytes * 1e9:
        raise InputError(
            f"teacher_cache may grow to {shape.total_bytes / 1e9:.1f} GB for each teacher, above its max_gigabytes "
            f"{config.max_gigabytes:g}: set teacher_cache.top_k or data.augment.view_bank, or raise it"
        )
    return shape


def _folder(study: Study, config: TeacherCacheConfig, job: Job, teacher: Job, precision: str) -> Path:
    """Return where a teacher's answers lie; to views from a bank each seed of students has its own.

    The precision is its students', and may differ among them.
    """
    folder = (config.folder or study.folder / FOLDER) / teacher.arm / f"seed{teacher.seed}" / precision
    return folder if study.config.data.augment.view_bank is None else folder / f"bank{job.seed}"


def _provenance(study: Study, job: Job, teacher: Classifier, training: TrainingConfig) -> dict[str, Any]:
    """Return what the answers depend on."""
    augment = study.config.data.augment
    return {
        "teacher": weights_checksum(teacher.network),
        "mean": teacher.mean.flatten().tolist(),
        "std": teacher.std.flatten().tolist(),
        "input_size": teacher.input_size,
        "data": study.data.checksum,
        "augment": augment.model_dump(mode="json"),
        "bank_seed": None if augment.view_bank is None else bank_seed(job),
        "precision": training.precision,
    }
