"""Our own trainings, put together without files as a study does it, for measurements of their steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal

import torch

from soteacher.assembly import Assembled, assemble
from soteacher.config import StudyConfig
from soteacher.data import Cifar100Config, DataSet, ImageSplit, TrainLoader, load_data
from soteacher.jobs import Job, Study
from soteacher.models.classifier import Classifier
from soteacher.models.zoo import build_network
from soteacher.networks import make_trainee
from soteacher.objective import Stage
from soteacher.train.loop import Trainee, train_step
from soteacher.types import Batch, View

CLASSES, EXAMPLES = 100, 50_000
"""CIFAR-100's training set, as far as memories are concerned."""
UNACCELERATED = {"channels_last": False, "compile": False}
"""Training settings for measurements of something else: every network is run in the same, ordinary way."""

Role = Literal["teacher", "student"]


def data_of(root: Path | None = None, *, examples: int = EXAMPLES) -> DataSet:
    """Return CIFAR-100 from a folder of data, or random images of its shape where none is named."""
    if root is not None:
        return load_data(Cifar100Config(), root)
    generator = torch.Generator().manual_seed(0)

    def split(size: int) -> ImageSplit:
        images = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return ImageSplit(images=images, labels=torch.arange(size) % CLASSES)

    return DataSet(
        name="random", train=split(examples), test=split(CLASSES), class_names=tuple(map(str, range(CLASSES))),
        mean=(0.5,) * 3, std=(0.25,) * 3, checksum="",
    )  # fmt: skip


def study_of(data: DataSet, **settings: Any) -> Study:
    """Return a study of these settings, of which nothing is written or read."""
    return Study(StudyConfig.model_validate({"data": {"source": "cifar100"}, **settings}), Path(), data, "cpu")


def assembled(study: Study, role: Role, name: str) -> Assembled:
    """Return a network of a study with its loss; a student's teacher is :func:`frozen_teacher`."""
    teacher = frozen_teacher(study) if role == "student" else None
    return assemble(study, _spec(study, role, name), role=role, seed=0, teacher=teacher, teacher_name="teacher")


def frozen_teacher(study: Study) -> Classifier:
    """Return the first teacher of a study with random weights, as students see it."""
    spec: Any = next(iter(study.config.teachers.values()))
    torch.manual_seed(1)
    network = build_network(spec.model, num_classes=study.data.num_classes)
    return Classifier(network, mean=study.data.mean, std=study.data.std).eval().requires_grad_(False)


def trainee_of(study: Study, role: Role, name: str, made: Assembled, stage: Stage = "training") -> Trainee:
    """Return a network in training, as the study would train it."""
    training = study.config.training_of(_spec(study, role, name))
    teachers = [frozen_teacher(study)] if role == "student" else []
    trainee = make_trainee(study, Job(role, name, 0), made, teachers, training, stage)
    trainee.forward.train()
    return trainee


def _spec(study: Study, role: Role, name: str) -> Any:
    return (study.config.teachers if role == "teacher" else study.config.students)[name]


def batches(study: Study, views: Sequence[View] = ()) -> Iterator[Batch]:
    """Return augmented batches of a study's training images, epoch after epoch."""
    loader = TrainLoader(
        study.data.train, batch_size=study.config.training.batch_size, augment=study.config.data.augment, seed=0,
        device="cpu", views=views,
    )  # fmt: skip
    return chain.from_iterable(loader.epoch(epoch) for epoch in count())


def steps(trainee: Trainee, source: Iterator[Batch]) -> Callable[[], None]:
    """Return a function that takes the next step of a training, loading of the batch included."""
    numbers = count()

    def take_step() -> None:
        train_step(trainee, next(source), epoch=1, progress=0.5, seed=next(numbers))

    return take_step


def allow_compilations() -> None:
    """Let one process compile many networks: past PyTorch's limit they would run uncompiled, and nothing would tell."""
    torch._dynamo.config.recompile_limit = 256  # pyright: ignore[reportPrivateUsage,reportAttributeAccessIssue]
