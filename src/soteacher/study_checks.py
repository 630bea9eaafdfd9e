"""What can be found out about a study before anything is trained or written: networks, losses, last batches, folds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from soteacher.assembly import assemble, examples_of, look_at
from soteacher.config import FileTeacher, SavedTeacher, Student, StudyConfig, TrainedTeacher
from soteacher.diagnostics.card import check_distribution
from soteacher.errors import InputError
from soteacher.jobs import Job, NetworkFactory, Study, load_teacher_file, rows_of
from soteacher.models.classifier import Classifier
from soteacher.models.parts import Parts
from soteacher.models.temperature import divide_logits
from soteacher.models.zoo import check_network
from soteacher.out_of_fold import fold_studies
from soteacher.train.logs import check_loggers


def check_names(config: StudyConfig, factories: Mapping[str, NetworkFactory]) -> None:
    """Find misspelt networks and missing packages before a data set is downloaded for them."""
    check_loggers(config.logging)
    for spec in (*config.teachers.values(), *config.students.values(), *([config.folds] if config.folds else [])):
        model = None if isinstance(spec, SavedTeacher) else spec.model
        if model is not None and model not in factories:
            check_network(model)


def check_networks(study: Study) -> None:
    """Build every network and its loss, so that what cannot work fails before anything is written."""
    teachers = {name: _untrained(study, name) for name in study.config.teachers}
    for name, classifier in teachers.items():
        look_at(study, classifier, _title(study, name))
    for arm in study.config.arms():
        student, teacher = study.config.students[arm.student], None if arm.teacher is None else teachers[arm.teacher]
        title = "" if arm.teacher is None else _title(study, arm.teacher)
        made = assemble(study, student, role="student", seed=0, teacher=teacher, teacher_name=title)
        made.start_training()
        _check_training(study, Job("student", arm.name, study.config.seeds[0]), student, made.classifier)


def _title(study: Study, teacher: str) -> str:
    """Return how messages call a teacher: by its network, where the settings say it."""
    spec = study.config.teachers[teacher]
    return f"teacher {teacher if isinstance(spec, SavedTeacher) or spec.model is None else spec.model}"


def _untrained(study: Study, teacher: str) -> Classifier:
    """Return a teacher of the study as it is before its training."""
    spec = study.config.teachers[teacher]
    if isinstance(spec, SavedTeacher):
        return _untrained(study, spec.teacher)
    if isinstance(spec, FileTeacher):
        return load_teacher_file(study, spec)[0]
    start = None if spec.start is None else study.config.teachers[spec.start]
    if isinstance(start, FileTeacher) and (model := load_teacher_file(study, start)[1].model) != spec.model:
        raise InputError(
            f"teachers.{teacher}.start: {spec.start} is a {model}, and a {spec.model} was to go on from it"
        )
    other = None if spec.teacher is None else _untrained(study, spec.teacher)
    title = "" if spec.teacher is None else _title(study, spec.teacher)
    made = assemble(study, spec, role="teacher", seed=0, teacher=other, teacher_name=title)
    made.start_training()
    _check_training(study, Job("teacher", teacher, study.config.seeds[0]), spec, made.classifier)
    return made.classifier


def _check_training(study: Study, job: Job, spec: TrainedTeacher | Student, classifier: Classifier) -> None:
    """Find what would fail in the last batch of an epoch, or only after the last epoch."""
    _check_last_batch(study, spec, classifier, examples=len(rows_of(study, job)[0]))
    if study.config.training_of(spec).calibrate:
        try:
            nn.init.normal_(
                Parts(classifier).classifier.weight
            )  # a head that begins with zeros would hide what follows
            divide_logits(classifier, 2.0, examples_of(study, classifier))
        except InputError as error:
            raise InputError(f"{job.role}s.{job.arm}: calibrate: {error}") from None


@torch.no_grad()
def _check_last_batch(study: Study, spec: TrainedTeacher | Student, classifier: Classifier, *, examples: int) -> None:
    """Make sure that a network can be trained on the last batch of an epoch where that is a single example."""
    size = study.config.training_of(spec).batch_size
    if examples % size != 1 and size != 1:
        return
    data = study.data
    try:
        classifier.train()(torch.full((1, data.in_channels, data.image_size, data.image_size), 0.5))
    except ValueError as error:
        raise InputError(
            f"{spec.model} cannot be trained on a batch of one example, and {examples} examples in batches of {size} "
            f"leave one: choose another batch_size ({error})"
        ) from error


def check_out_of_fold(study: Study) -> None:
    """Find what the networks of the folds would fail at before anything is trained."""
    if study.config.folds is None:
        return
    for part in fold_studies(
        study.config.folds, study.config.data, study.data, study.folder, study.device, study.factories
    ):
        check_networks(part)


def check_cards(study: Study) -> None:
    """Find that a card needs a label distribution that the data have not."""
    if study.config.card is not None:
        check_distribution(study.data, study.config.card)
